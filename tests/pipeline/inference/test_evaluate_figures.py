"""`python -m pipeline.evaluate`: files of other programs, distances, figures per class, and what is measured of a run."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest
import torch
import yaml

from pipeline import evaluate
from pipeline.evaluation.retrieval import retrieve
from pipeline.evaluation.tasks import test_task as task_of
from pipeline.inference import trained_model
from pipeline.runs.checkpoint import Checkpoints
from pipeline.storage import Folder
from pipeline.testing.tiny import write_tiny_store
from tests.pipeline.conftest import Base
from tests.pipeline.inference.test_evaluate import Evaluate, arrays, measure, quiet, refused

__all__ = ["measure", "quiet"]  # fixtures


# ---- arrays of other programs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "bytes", "float", "column", "small"])
def test_labels_of_other_kinds(kind: str, measure: Evaluate, tmp_path: Path) -> None:
    (x, y), *_ = arrays(tmp_path, 40, 0, "q")
    numbers = np.load(y)
    forms = {"text": [f"c{v}" for v in numbers], "bytes": [f"c{v}".encode() for v in numbers],
             "float": numbers.astype(np.float64), "column": numbers[:, None], "small": numbers.astype(np.uint8)}  # fmt: skip
    np.save(tmp_path / "other.npy", np.array(forms[kind]))
    assert measure(x, tmp_path / "other.npy") == measure(x, y)
    assert measure(x, y, "--gallery", x, y) == measure(
        x, tmp_path / "other.npy", "--gallery", x, tmp_path / "other.npy"
    )


def test_files_that_are_no_arrays(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (x, y), *_ = arrays(tmp_path, 20, 0, "q")
    np.savez(tmp_path / "z.npz", x=np.load(x))
    (tmp_path / "empty.npy").write_bytes(b"")
    torch.save(torch.zeros(20, 5), tmp_path / "t.pt")
    np.save(tmp_path / "o.npy", np.array([{}] * 20), allow_pickle=True)
    np.save(tmp_path / "words.npy", np.array(["a"] * 20))
    (tmp_path / "half.npy").write_bytes(x.read_bytes()[:150])
    for arguments, says in (
        ([tmp_path / "z.npz", y], "is a .npz archive of several arrays: save each as np.save"),
        ([tmp_path / "empty.npy", y], "empty.npy is empty (0 bytes)"),
        ([tmp_path / "t.pt", y], "is a file of torch.save: save it as np.save"),
        ([x, tmp_path / "o.npy"], "holds Python objects (dtype object); save numbers or text"),
        ([tmp_path / "half.npy", y], "half.npy cannot be read as a .npy array"),
        ([x, tmp_path / "words.npy", "--gallery", x, y], "both numbers or both text"),
        ([x, y, "--data", "birds"], "go with a run"),
    ):
        refused(arguments, says, capsys)


def test_euclidean_distance_of_arrays(measure: Evaluate, tmp_path: Path) -> None:
    paths, x, y = arrays(tmp_path, 60, 0, "q")
    assert measure(*paths, "--distance", "euclidean") == retrieve(x, y, distance="euclidean").summary((1, 2, 4, 8))


def test_figures_per_class(measure: Evaluate, tmp_path: Path) -> None:
    (x, _), vectors, y = arrays(tmp_path, 60, 0, "q")
    np.save(tmp_path / "names.npy", np.array([f"class {v}" for v in y.tolist()[:-1]] + ["alone"]))
    measure(x, tmp_path / "names.npy", "--per-class", tmp_path / "c.csv", "--recall-at", "1", "3")
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    y[-1] = 99
    found = retrieve(vectors, y)
    assert [r["class"] for r in rows][-1] == "alone" and rows[-1]["queries"] == "0" and rows[-1]["map@r"] == ""
    values = [float(r["map@r"]) for r in rows[:-1]]
    assert values == sorted(values) and len(rows) == len(set(y.tolist()))
    for row in rows[:-1]:
        own = (y == int(row["class"].split()[1])).numpy()
        assert float(row["map@r"]) == pytest.approx(100 * found.average_precision[own].mean(), abs=1e-4)
        assert float(row["recall@3"]) == pytest.approx(100 * (found.first_hit[own] < 3).mean(), abs=1e-4)
        assert int(row["queries"]) == own.sum()


# ---- what is measured of a run ---------------------------------------------------------------------------------------


def said(arguments: list[Any], capsys: pytest.CaptureFixture) -> str:
    assert evaluate.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_split_checkpoint_and_protocol_stand_beside_the_figures(base: Base, capsys: pytest.CaptureFixture) -> None:
    out = said([base.run.path()], capsys)
    step = Checkpoints(base.run).latest().best_step
    assert f"test classes of {base.store.title}, best checkpoint of step {step}\n" in out
    assert "protocol: profile fair, trained_on training classes without fold 0, checkpoint best by map@r" in out
    assert "distance cosine" in out and "not finished" not in out
    assert "validation fold 0 of the training classes of tiny (" in said(
        [base.run.path(), "--split", "validation"], capsys
    )
    out = said([base.run.path(), "--distance", "euclidean"], capsys)
    assert "all embeddings have length one: Euclidean distance ranks them as cosine does" in out


def test_an_unfinished_run_is_measured_on_its_validation_fold(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = unfinished(base, tmp_path)
    out = said([copy], capsys)
    assert "validation fold 0 of the training classes" in out and "the run is not finished" in out
    out = said([copy, "--split", "test"], capsys)
    assert "test classes of tiny (" in out and "not finished" not in out
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"]["validation_fold"] = None
    config["evaluation"]["checkpoint"] = "last"
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    refused([copy], "is not finished and has no validation fold: --split test measures its test classes", capsys)


def unfinished(base: Base, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(base.run.path(), copy)
    latest = Checkpoints(Folder(copy)).steps()[-1]
    record = copy / "checkpoints" / f"step-{latest:08d}" / "checkpoint.json"
    values = json.loads(record.read_text())
    values["progress"]["finished"] = False
    record.write_text(json.dumps(values))
    (copy / "summary.json").unlink()
    return copy


def test_a_run_is_measured_on_another_dataset(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The training dataset need not exist then, unless the run is of a version that did not record its number of classes."""
    other = write_tiny_store(tmp_path / "other", seed=5)
    run = tmp_path / "run"
    shutil.copytree(base.run.path(), run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"dataset": str(tmp_path / "gone")}))
    out = said([run, "--data", other.folder.path(), "--json", tmp_path / "m.json"], capsys)
    assert "test classes of tiny (" in out and "another dataset than the run's" in out
    trained = trained_model.load_run(str(run))
    embedder, trunk, method = trained.load(other, torch.device("cpu"))
    task = task_of(trained.config, other)
    expected = retrieve(embedder(task.queries.ids, trunk, method), torch.from_numpy(task.queries.labels)).summary()
    found = json.loads((tmp_path / "m.json").read_text())
    assert found == {k: v for k, v in expected.items() if k in found}
    refused([run, "--data", "no-such"], "there is no dataset 'no-such'", capsys)
    refused([run, "--data", other.folder.path(), "--split", "validation"], "--data measures the test images", capsys)
    del record["classes"]
    (run / "run.json").write_text(json.dumps(record | {"dataset": str(tmp_path / "gone")}))
    refused([run, "--data", other.folder.path()], "does not record its number of training classes", capsys)


def test_files_of_embeddings_are_a_parquet_dataset(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = said([base.run.path(), "--embed-to", tmp_path / "out", "--workers", "0"], capsys).split()[0]
    assert pyarrow.dataset.dataset(str(tmp_path / "out")).count_rows() == int(rows)
    earlier = tmp_path / "out" / "_embeddings.json"
    earlier.rename(tmp_path / "out" / "embeddings.json")  # as earlier versions called it
    assert said([base.run.path(), "--embed-to", tmp_path / "out", "--workers", "0"], capsys).split()[0] == rows
    assert not earlier.exists()
