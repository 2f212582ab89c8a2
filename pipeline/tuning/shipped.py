"""The sweep files that come with the program; no module here imports PyTorch."""

from __future__ import annotations

from pathlib import Path

from pipeline import ROOT
from pipeline.recipes import title_of

SHIPPED = Path(ROOT) / "tune_configs"  # of a checkout, and of an installed package too


def sweep_file_names() -> list[str]:
    """Names of the shipped sweep files."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def sweep_file_title(name: str) -> str:
    """The first sentence of a shipped sweep file's comment."""
    return title_of(SHIPPED / f"{name}.yaml")
