"""A real browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def chromium() -> str:
    """Debian's browser; `make test` leaves this test out, and says so, where there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("chromium is not installed (apt-get install chromium): the report cannot be looked at")
    return path


def screenshot(html: str, folder: Path) -> np.ndarray:
    """uint8 [3000, 1200, 3]: what the browser paints."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [chromium(), *flags.split(), "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1200,3000",
        f"--screenshot={folder / 'page.png'}",
    ]
    subprocess.run([*command, (folder / "page.html").as_uri()], check=True, capture_output=True, timeout=120)
    return np.asarray(Image.open(folder / "page.png").convert("RGB"))
