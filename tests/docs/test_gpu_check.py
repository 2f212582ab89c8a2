"""The check that a user with GPUs runs works, in a reduced form on the CPU; the numbers of its table come from real runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tools import gpu_check


def test_the_check_runs_on_a_cpu_and_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert gpu_check.main(["--device", "cpu", "--methods", "osm_caa", "--json", str(path)]) == 0, (
        capsys.readouterr().out
    )
    table = json.loads(path.read_text())
    rows = ["osm_caa", "osm_caa: again", "osm_caa: resumed", "osm_caa: in parts", "loaded"]
    assert [row["check"] for row in table["rows"]] == rows
    assert table["facts"]["torch"] == torch.__version__
    assert "5 of 5 passed" in capsys.readouterr().out


def test_a_difference_fails_the_check() -> None:
    assert gpu_check.difference({"w": torch.tensor([1.0, 2.1])}, {"w": torch.tensor([1.0, 2.0])}) > gpu_check.CLOSE


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "--device cpu" in capsys.readouterr().err
