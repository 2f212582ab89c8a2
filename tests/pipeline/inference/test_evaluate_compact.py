"""`python -m pipeline.evaluate --dims --quantise`, and a run whose method trained nested dimensions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline import evaluate, train
from pipeline.evaluation.compact import measure_compact
from pipeline.evaluation.evaluate_task import embed_task, measure_embeddings
from pipeline.evaluation.tasks import test_task as task_of
from pipeline.inference.trained_model import load_run
from pipeline.runs.terminal import show_summary
from pipeline.storage import Folder
from tests.pipeline.conftest import Base
from tests.pipeline.evaluation.test_tracklets import start, write_video
from tests.pipeline.inference.test_evaluate import arrays, quiet, refused
from tests.stubs import tiny_values

__all__ = ["quiet"]  # fixture


@pytest.fixture(scope="module")
def nested(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A finished run that trained prefixes of 2 and 4 dimensions."""
    root = tmp_path_factory.mktemp("nested")
    changes = {"name": "nested", "length": "1 epochs", "method.matryoshka": [2, 4], "evaluation.checkpoint": "last"}
    (root / "recipe.yaml").write_text(yaml.safe_dump(tiny_values(str(root), base.store.folder.uri, changes)))
    assert train.main([str(root / "recipe.yaml")]) == 0
    return Folder(root / "runs" / "nested")


def table(out: str) -> list[list[str]]:
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("dims "))
    return [line.split() for line in lines[start + 1 :] if line[:1].isdigit()]


def test_a_run_with_prefixes_reports_each_dimension(
    nested: Folder, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In summary.json, in the terminal, in the report and by the command: as a plain cut of the embeddings gives it."""
    summary = nested.read_json("summary.json")
    trained = load_run(nested.uri)
    embedder, trunk, method = trained.load(base.store, torch.device("cpu"))
    task = task_of(trained.config, base.store)
    assert task is not None
    embedded = embed_task(task, embedder, trunk, method)
    found = {}
    for dim in (8, 4, 2):
        cut = torch.nn.functional.normalize(embedded.rows[:, :dim])
        rows = type(embedded)(embedded.queries, embedded.gallery, cut, embedded.query_rows, embedded.gallery_rows)
        found[dim] = measure_embeddings(task, rows, embedder.ranks, (1, 2)).metrics
    assert found[2]["map@r"] != found[4]["map@r"] != found[8]["map@r"]
    rounded = {str(dim): {k: round(v, 4) for k, v in metrics.items()} for dim, metrics in found.items()}
    assert summary["by_dim"] == rounded and list(summary["by_dim"]) == ["8", "4", "2"]
    assert rounded["8"].items() <= summary["final"].items()

    assert evaluate.main([nested.path(), "--json", str(tmp_path / "m.json")]) == 0
    out = capsys.readouterr().out
    figures = [[f"{found[dim][k]:.2f}" for k in ("recall@1", "recall@2", "map@r", "r_precision")] for dim in (8, 4, 2)]
    assert table(out) == [
        [str(dim), "float32", str(4 * dim), "cosine", "cosine", *row]
        for dim, row in zip((8, 4, 2), figures, strict=True)
    ]
    written = json.loads((tmp_path / "m.json").read_text())["compact"]
    assert [(row["dim"], row["bytes_per_image"], row["metrics"]) for row in written] == [
        (dim, 4 * dim, pytest.approx(found[dim])) for dim in (8, 4, 2)
    ]
    show_summary(nested)
    out = capsys.readouterr().out
    assert "dimensions" in out and all(value in out for row in figures for value in row)
    report = nested.read("report.html").decode()
    assert "By dimensions kept" in report
    for dim, row in zip((8, 4, 2), figures, strict=True):
        cells = "".join(f"<td>{value}</td>" for value in row)
        assert f'<tr data-dim="{dim}"><th scope="row">{dim}</th>{cells}</tr>' in report


def test_a_run_without_prefixes_says_nothing_of_them(base: Base, capsys: pytest.CaptureFixture) -> None:
    assert "by_dim" not in base.run.read_json("summary.json")
    assert "By dimensions kept" not in base.run.read("report.html").decode()
    assert evaluate.main([base.run.path()]) == 0
    assert "bytes" not in capsys.readouterr().out


def test_a_run_and_its_arrays_give_the_same_table(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--dims", "2", "--quantise", "int8", "binary", "--oversample", "2"]
    assert evaluate.main([base.run.path(), *options, "--save", str(tmp_path / "e")]) == 0
    of_run = table(capsys.readouterr().out)
    paths = [str(tmp_path / f"e.{name}.npy") for name in ("embeddings", "labels")]
    assert evaluate.main([*paths, *options, "--recall-at", "1", "2"]) == 0
    assert table(capsys.readouterr().out) == of_run
    assert [row[:2] for row in of_run] == [["8", k] for k in KINDS] + [["2", k] for k in KINDS]


KINDS = ["float32", "int8", "int8", "int8", "binary", "binary", "binary", "binary"]


def test_arrays_with_a_gallery(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    queries, x, y = arrays(tmp_path, 20, 0, "q")
    gallery, gx, gy = arrays(tmp_path, 50, 1, "g")
    found = tmp_path / "m.json"
    given = [*map(str, queries), "--gallery", *map(str, gallery), "--quantise", "int8", "--json", str(found)]
    assert evaluate.main(given) == 0
    expected = [row.as_json() for row in measure_compact(x, y, gx, gy, quantise=["int8"])]
    assert json.loads(found.read_text())["compact"] == expected


def test_dimensions_of_tracklets(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert start(write_video(tmp_path), tmp_path, {}) == 0
    run = str(tmp_path / "runs" / "tiny")
    capsys.readouterr()
    assert evaluate.main([run, "--dims", "3"]) == 0
    rows = table(capsys.readouterr().out)
    final = Folder(run).read_json("summary.json")["final"]
    assert [row[0] for row in rows] == ["8", "3"] and rows[0][5] == f"{final['cmc@1']:.2f}"
    refused([run, "--quantise", "int8"], "for retrieval, not for re-identification", capsys)


def test_what_is_refused(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, ((x, y), *_) = base.run.path(), arrays(tmp_path, 20, 0, "q")
    for arguments, says in (
        ([run, "--dims", "9"], "9 dimensions cannot be kept of embeddings of 8: expected 1 to 8"),
        ([x, y, "--dims", "6"], "6 dimensions cannot be kept of embeddings of 5"),
        ([x, y, "--dims", "0"], "0 dimensions cannot be kept"),
        ([x, y, "--quantise", "int8", "--distance", "euclidean"], "leave out --quantise or --distance"),
        ([run, "--oversample", "3"], "--oversample 3: expected 1 or more, and --quantise"),
        ([run, "--quantise", "int8", "--oversample", "0"], "--oversample 0: expected 1 or more"),
        ([run, run, "--dims", "3"], "--dims goes with one run, got 2"),
        ([run, "--embed-to", tmp_path / "e", "--quantise", "int8"], "--embed-to goes with one run"),
    ):
        refused(arguments, says, capsys)  # type: ignore[arg-type]


def test_a_wrong_dimension_is_told_before_an_image_is_embedded(base: Base, monkeypatch: Any) -> None:
    monkeypatch.setattr("pipeline.inference.trained_model.TrainedModel.load", lambda *_: pytest.fail("loaded"))
    assert evaluate.main([base.run.path(), "--dims", "9"]) == 2
