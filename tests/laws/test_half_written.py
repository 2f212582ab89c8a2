"""Whoever writes is killed at random moments; nothing half-written is ever read."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["store", "cache", "decoded", "embeddings", "run"])
def test_fifty_kills_while_it_is_written(kind: str, tmp_path: Path) -> None:
    kills(kind, tmp_path, 50)


def test_a_few_kills_while_a_store_is_written(tmp_path: Path) -> None:
    kills("store", tmp_path, 4)


def kills(kind: str, folder: Path, number: int) -> None:
    seed = random.randrange(2**31)
    done = subprocess.run(
        [sys.executable, "-m", "tests.laws.half_written", kind, str(folder), str(number), str(seed)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"seed {seed}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == number, found
    assert kind not in ("cache", "decoded") or found["nothing there"], "every kill came too late"
    print(kind, found)
