"""Several runs measured together: their embeddings at length one, side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipeline import evaluate, train
from pipeline.data.store import Store
from pipeline.errors import DivergedError
from pipeline.inference.ensemble import concatenated, measure_ensemble
from pipeline.inference.trained_model import load_run
from pipeline.storage import Folder
from tests.pipeline.conftest import Base
from tests.pipeline.evaluation.test_tracklets import start, write_video
from tests.pipeline.inference.test_evaluate import quiet, refused
from tests.stubs import tiny_values

__all__ = ["quiet"]  # fixture


@pytest.fixture(scope="module")
def runs(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Folder]:
    """The finished run and one of another seed and width, with other K of Recall@K."""
    root = tmp_path_factory.mktemp("ensemble")
    changes = {"name": "wide", "length": "1 epochs", "seed": 8, "method.embedding_dim": 5, "evaluation.recall_at": [1, 4],
               "evaluation.checkpoint": "last"}  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(tiny_values(str(root), base.store.folder.uri, changes)))
    assert train.main([str(root / "recipe.yaml")]) == 0
    return [base.run, Folder(root / "runs" / "wide")]


def embeddings(run: Folder, store: Store) -> np.ndarray:
    embedder, trunk, method = load_run(run.uri).load(store, torch.device("cpu"))
    return embedder(store.select(["test"]).ids, trunk, method).numpy()


def brute_force(x: np.ndarray, labels: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    """Leave-one-out Recall@K and MAP@R by sorting every row of cosines."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    hits, precision = [], []
    for i, cosines in enumerate(unit @ unit.T):
        order = np.argsort(-cosines, kind="stable")
        right = labels[order[order != i]] == labels[i]
        relevant = int(right.sum())
        if relevant:
            hits.append([right[:k].any() for k in ks])
            first = right[:relevant]
            precision.append((np.cumsum(first) / np.arange(1, relevant + 1) * first).sum() / relevant)
    recalls = 100 * np.mean(hits, axis=0)
    return {f"recall@{k}": recalls[i] for i, k in enumerate(ks)} | {"map@r": 100 * np.mean(precision)}


def test_two_runs_equal_a_plain_computation(runs: list[Folder], base: Base) -> None:
    found = measure_ensemble(runs)
    parts = [embeddings(run, base.store) for run in runs]
    units = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    assert [part.shape[1] for part in parts] == [8, 5]
    expected = brute_force(np.concatenate(units, axis=1), base.store.select(["test"]).labels, (1, 2, 4))
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-9)
    own = [brute_force(part, base.store.select(["test"]).labels, (1, 2, 4)) for part in parts]
    assert expected not in own and {"nmi", "ami"} <= set(found)


def test_a_run_beside_itself_is_that_run(base: Base) -> None:
    final = base.run.read_json("summary.json")["final"]
    for number in (1, 2, 3):
        found = measure_ensemble([base.run] * number)
        assert {key: round(value, 4) for key, value in found.items()} == final


def test_rows_have_length_one_and_their_cosine_is_the_mean(base: Base) -> None:
    parts = [torch.randn(20, dim, generator=torch.Generator().manual_seed(dim)) * dim for dim in (3, 7)]
    units = [torch.nn.functional.normalize(part.double()) for part in parts]
    rows = concatenated([*parts])
    assert rows.dtype == torch.float64 and rows.shape == (20, 10)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(rows @ rows.T, sum(unit @ unit.T for unit in units) / 2)
    parts[1][4] = 0
    with pytest.raises(DivergedError, match="1 of 20 rows of run 2 are zero or not finite"):
        concatenated([*parts])


def test_tracklets_of_a_re_identification_dataset(tmp_path: Path) -> None:
    assert start(write_video(tmp_path), tmp_path, {"evaluation.reranking": {"k1": 5, "k2": 2}}) == 0
    run = Folder(tmp_path / "runs" / "tiny")
    final = run.read_json("summary.json")["final"]
    assert "cmc@1" in final and {k: round(v, 4) for k, v in measure_ensemble([run, run]).items()} == final


# ---- the command -----------------------------------------------------------------------------------------------------


def test_each_run_stands_beside_the_concatenated_figure(
    runs: list[Folder], base: Base, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = [run.uri for run in runs]
    assert evaluate.main([*names, "--clustering", "--json", str(tmp_path / "m.json")]) == 0
    out, err = capsys.readouterr()
    title, header, *rows, concatenated_row, distance = out.splitlines()
    found = json.loads((tmp_path / "m.json").read_text())
    assert not err and title == f"test classes of {base.store.title}, 28 queries" and distance == "distance cosine"
    assert found["concatenated"] == measure_ensemble(runs)
    for run, row, own in zip(runs, rows, found["runs"], strict=True):
        metrics = own["metrics"]
        final = run.read_json("summary.json")["final"]
        assert own["run"] == run.uri and {k: round(metrics[k], 4) for k in final if k in metrics} == {
            k: v for k, v in final.items() if k in metrics
        }
        shown = [f"{metrics[key]:.2f}" for key in header.split()[1:-1]]
        assert row.split()[:-4] in ([run.uri, *shown], [run.uri, *shown, "best"])
    assert rows[0].endswith(f"best checkpoint of step {load_run(names[0]).step}") and "best" not in rows[1]
    assert concatenated_row.split() == [
        "concatenated",
        *(f"{found['concatenated'][k]:.2f}" for k in header.split()[1:-1]),
    ]
    assert evaluate.main([*names, "--recall-at", "3", "--json", str(tmp_path / "m.json")]) == 0
    assert [k for k in json.loads((tmp_path / "m.json").read_text())["concatenated"] if "@" in k] == [
        "recall@3",
        "map@r",
    ]


def test_runs_that_cannot_be_measured_together(
    runs: list[Folder], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def changed(name: str, edit: Any) -> str:
        copy = tmp_path / name
        shutil.copytree(runs[0].path(), copy)
        edit(copy)
        return str(copy)

    def other_dataset(run: Path) -> None:
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {"fingerprint": "other"}))

    def euclidean(run: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["evaluation"]["distance"] = "euclidean"
        (run / "config.yaml").write_text(yaml.safe_dump(config))

    def unfinished(run: Path) -> None:
        for file in (run / "checkpoints").glob("*/checkpoint.json"):
            record = json.loads(file.read_text())
            record["progress"]["finished"] = False
            file.write_text(json.dumps(record))

    first = runs[0].uri
    refused([first, changed("a", other_dataset)], "are of different datasets (other, ", capsys)
    refused([first, changed("b", euclidean)], "evaluation.distance of ", capsys)
    refused([first, changed("c", unfinished)], "is not finished: its test classes are not measured yet", capsys)
    refused([first, "no-such-run"], "'no-such-run' is neither a run folder nor a run", capsys)
    for option in (
        ["--split", "test"],
        ["--data", "x"],
        ["--distance", "cosine"],
        ["--per-class", "x.csv"],
        ["--save", "x"],
    ):
        refused([first, first, *option], f"{option[0]} goes with one run, got 2", capsys)
