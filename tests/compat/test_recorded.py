"""What earlier programs left behind is still opened, continued and measured alike; see `tests.compat.record`.

Numbers are compared to 1e-6, since other processors and versions of torch round differently; a program on the machine of
the recording gives the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from pipeline import evaluate, report, train
from tests.compat.record import CASES, RECORDED, ROOT, TEXT, resolved_presets

TOLERANCE = 1e-6  # relative; of a tensor to its largest element
TIMED = re.compile(r"images_per_second|waiting|waiting_for_data|(validation_)?seconds(/.*)?")


def restore(root: Path, name: str) -> Path:
    """Puts the datasets and what is recorded as `name` below `root`, as if it had been made there; returns its folder."""
    for source, target in ((RECORDED / "stores", root / "data"), (RECORDED / name, root / name)):
        shutil.copytree(source, target)
    shutil.copytree(root / name / "run", root / "runs" / Path(name).name)
    for path in root.rglob("*"):
        if path.suffix in TEXT:
            path.write_bytes(path.read_bytes().replace(ROOT.encode(), str(root).encode()))
    return root / name


def agree(got: Any, expected: Any, where: str = "") -> None:
    """All that was recorded is there and the same; what programs add is not compared."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            if not TIMED.fullmatch(key):
                assert key in got, f"{where}/{key} is gone"
                agree(got[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for i, value in enumerate(expected):
            agree(got[i], value, f"{where}/{i}")
    elif isinstance(expected, float):
        assert math.isclose(got, expected, rel_tol=TOLERANCE, abs_tol=1e-9), f"{where}: {got}, recorded {expected}"
    else:
        assert got == expected, f"{where}: {got}, recorded {expected}"


def agree_tensors(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        scale = np.abs(tensor).max(initial=0)
        np.testing.assert_allclose(got[name], tensor, rtol=0, atol=TOLERANCE * scale, err_msg=name)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_continues_to_the_weights_of_the_uninterrupted_one(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recorded = restore(tmp_path, f"killed/{case}")
    run = tmp_path / "runs" / case
    before = len(lines(run / "metrics.jsonl"))
    assert train.main([str(recorded / "recipe.yaml")]) == 0
    assert "resumed at step 7" in capsys.readouterr().err
    got, whole = lines(run / "metrics.jsonl"), recorded / "whole"
    assert len(got) > before
    agree(got, lines(whole / "metrics.jsonl"))
    agree(json.loads((run / "summary.json").read_text()), json.loads((whole / "summary.json").read_text()))
    last = max((run / "checkpoints").iterdir())
    for name in ("trunk.safetensors", "method.safetensors"):
        agree_tensors(load_file(last / name), load_file(whole / name))


def test_a_finished_run_is_shown_measured_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recorded = restore(tmp_path, "finished")
    run = tmp_path / "runs" / "finished"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert train.main([str(recorded / "recipe.yaml")]) == 0
    assert "finished: retrieval on" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, "nothing is trained again"

    assert evaluate.main([str(run), "--clustering", "--json", str(tmp_path / "evaluate.json")]) == 0
    agree(json.loads((tmp_path / "evaluate.json").read_text()), json.loads((recorded / "evaluate.json").read_text()))

    (run / "report.html").unlink()
    assert report.main([str(run)]) == 0
    page, old = (run / "report.html").read_text(), (recorded / "run" / "report.html").read_text()
    figures, gallery = (
        [re.findall(pattern, text[text.index(f'id="{part}"') :].split("</section>")[0]) for text in (page, old)]
        for part, pattern in (("metrics", r"<td[^>]*>([-+]?[\d.,]+)</td>"), ("gallery", r'data-sample="(\d+)"'))
    )
    assert figures[0] == figures[1] and len(figures[1]) > 10
    assert gallery[0] == gallery[1] and len(gallery[1]) > 10, "from test_neighbours.npz"
    assert "raydml explore" in page and "data:image/jpeg" in page, "no embeddings were kept then"


def test_embeddings_are_the_same_and_finished_folders_stay(tmp_path: Path) -> None:
    recorded = restore(tmp_path, "finished")
    command = [str(tmp_path / "runs" / "finished"), "--split", "all", "--workers", "0", "--embed-to"]
    there = {p: p.read_bytes() for p in (recorded / "embeddings").iterdir()}
    assert evaluate.main([*command, str(recorded / "embeddings")]) == 0
    assert {p: p.read_bytes() for p in (recorded / "embeddings").iterdir()} == there

    assert evaluate.main([*command, str(tmp_path / "again")]) == 0
    got, expected = (
        pa.concat_tables(pq.read_table(part) for part in sorted(folder.glob("part-*.parquet")))
        for folder in (tmp_path / "again", recorded / "embeddings")
    )
    assert got.schema == expected.schema and len(got) == len(expected)
    for name in ("sample_id", "label", "class_name", "split"):
        assert got[name] == expected[name]
    vectors = [np.stack(table["embedding"].to_numpy()) for table in (got, expected)]
    np.testing.assert_allclose(*vectors, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["birds", "shop", "video"])
def test_stores_are_what_their_manifests_say(name: str) -> None:
    """The recording itself is whole: no line ending, filter or merge has touched it."""
    manifest = json.loads((RECORDED / "stores" / name / "manifest.json").read_text())
    for record in (manifest["catalog"], *manifest["shards"]):
        data = (RECORDED / "stores" / name / record["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == record["sha256"], record["file"]


def test_presets_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYDML_HOME", raising=False)
    agree(json.loads(json.dumps(resolved_presets())), json.loads((RECORDED / "presets.json").read_text()))
