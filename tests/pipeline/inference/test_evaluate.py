"""`python -m pipeline.evaluate`: arrays, and the checkpoints of a run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from methods import Baseline
from pipeline import evaluate, train
from pipeline.data.entries import Entry
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.evaluation.clustering import clustering
from pipeline.evaluation.retrieval import retrieve
from pipeline.evaluation.tasks import test_task as task_of
from pipeline.inference import embed, trained_model
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder
from pipeline.testing.tiny import write_images
from tests.pipeline.conftest import Base, contents
from tests.stubs import tiny_config, tiny_values

Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, fresh_readers: None) -> None:
    """The command would take all cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


@pytest.fixture
def measure(tmp_path: Path, capsys: pytest.CaptureFixture) -> Evaluate:
    """Runs the command; returns what it wrote to --json, having compared it with the table."""

    def command(*arguments: str | Path) -> dict[str, Any]:
        path = tmp_path / "metrics.json"
        assert evaluate.main([*map(str, arguments), "--json", str(path)]) == 0
        out, err = capsys.readouterr()
        metrics = json.loads(path.read_text())
        rows = {cells[0]: cells[1:] for cells in (line.replace("│", " ").split() for line in out.splitlines()) if cells}
        assert not err and all(rows[k] == [f"{v:.2f}"] for k, v in metrics.items() if not k.startswith("queries"))
        return metrics

    return command


def refused(arguments: list[str | Path], says: str, capsys: pytest.CaptureFixture) -> None:
    assert evaluate.main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err and not out


# ---- arrays ----------------------------------------------------------------------------------------------------------


def arrays(
    folder: Path, num: int, seed: int, name: str, dtype: Any = np.float32
) -> tuple[list[Path], torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 8, num)
    x = (np.random.default_rng(9).normal(size=(8, 5))[labels] + random.normal(size=(num, 5))).astype(dtype)
    paths = [folder / f"{name}x.npy", folder / f"{name}y.npy"]
    np.save(paths[0], x)
    np.save(paths[1], labels)
    return paths, torch.from_numpy(x if dtype == np.float64 else x.astype(np.float32)), torch.from_numpy(labels)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays(dtype: Any, measure: Evaluate, tmp_path: Path) -> None:
    paths, x, y = arrays(tmp_path, 60, 0, "q", dtype)
    assert measure(*paths) == retrieve(x, y).summary((1, 2, 4, 8))
    expected = retrieve(x, y).summary((3, 7)) | clustering(x, y)
    assert measure(*paths, "--recall-at", "3", "7", "--clustering") == expected


def test_arrays_with_a_gallery(measure: Evaluate, tmp_path: Path) -> None:
    queries, x, y = arrays(tmp_path, 20, 0, "q")
    gallery, gx, gy = arrays(tmp_path, 50, 1, "g")
    assert measure(*queries, "--gallery", *gallery) == retrieve(x, y, gallery=gx, gallery_labels=gy).summary(
        (1, 2, 4, 8)
    )


def test_arrays_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (x, y), *_ = arrays(tmp_path, 20, 0, "q")
    (tmp_path / "text.npy").write_text("1,2")
    saved = {"ints": np.ones((20, 3), int), "short": np.zeros(19, int), "floats": np.full(20, 0.5), "narrow": np.ones((20, 4), np.float32),
             "nan": np.full((20, 5), np.nan, np.float32), "alone": np.arange(20), "object": np.array([{}] * 20)}  # fmt: skip
    for name, array in saved.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    p = {name: tmp_path / f"{name}.npy" for name in [*saved, "text"]}
    for arguments, says in (
        ([x, y, y], "got 3 inputs, expected runs, or embeddings and labels"),
        ([tmp_path / "no.npy", y], "no.npy cannot be read as a .npy array"),
        ([p["text"], y], "text.npy cannot be read as a .npy array"),
        ([x, p["object"]], "object.npy cannot be read as a .npy array"),
        ([p["ints"], y], "contains int64 [20, 3], expected floats [N, D]"),
        ([y, x], "contains int64 [20], expected floats [N, D]"),
        ([x, p["floats"]], "row 0 is 0.5, no whole number"),
        ([x, p["short"]], "has 20 rows"),
        ([x, y, "--gallery", p["narrow"], y], "queries have 5 dimensions, the gallery has 4"),
        ([p["nan"], y], "20 of 20 embeddings rows are zero or not finite"),
        ([x, p["alone"]], "none of the 20 queries has another row of its class"),
        ([x, y, "--recall-at", "0"], "every K has to be at least 1"),
        ([x, y, "--checkpoint", "best"], "go with a run"),
        ([x, y, "--save", "z"], "go with a run"),
        ([x, y, "--json", tmp_path / "qx.npy" / "m.json"], "m.json cannot be written"),
    ):
        refused(arguments, says, capsys)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_is_measured_as_at_its_end(base: Base, measure: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    before = base.files()
    final = base.run.read_json("summary.json")["final"]
    metrics = measure(base.run.path(), "--clustering")
    assert {k: round(v, 4) for k, v in metrics.items()} == final
    monkeypatch.setenv("RAYDML_HOME", str(base.root))
    assert measure("done") == {k: v for k, v in metrics.items() if k not in ("nmi", "ami")}, "by name"
    assert set(measure("done", "--recall-at", "5")) >= {"recall@5", "map@r"}
    assert base.files() == before, "a run that is measured is not touched"


def test_every_checkpoint_gives_the_figures_that_were_logged(base: Base, measure: Evaluate) -> None:
    validations = {line["step"]: line for line in read_metrics(base.run) if line["kind"] == "validation"}
    checkpoints = Checkpoints(base.run)
    latest = checkpoints.latest()
    measured = {}
    for name, step in ((str(s), s) for s in checkpoints.steps() if s in validations):
        measured[step] = measure(base.run, "--split", "validation", "--checkpoint", name)
        assert measured[step] == {
            k: v for k, v in validations[step].items() if k not in ("step", "kind", "epoch", "images")
        }
    assert len({m["map@r"] for m in measured.values()}) == 2, "they differ"
    assert measure(base.run, "--split", "validation", "--checkpoint", "last") == measured[latest.step]
    assert measure(base.run, "--split", "validation", "--checkpoint", "best") == measured[latest.best_step]
    assert measure(base.run, "--split", "validation") == measured[latest.best_step], "as the protocol says"


def test_saved_embeddings_give_the_same_figures(base: Base, measure: Evaluate, tmp_path: Path) -> None:
    metrics = measure(base.run, "--save", tmp_path / "e")
    x, y = np.load(tmp_path / "e.embeddings.npy"), np.load(tmp_path / "e.labels.npy")
    assert x.shape == (28, 8) and x.dtype == np.float64 and np.allclose(np.linalg.norm(x, axis=1), 1)
    np.testing.assert_array_equal(y, base.store.select(["test"]).labels)
    assert measure(tmp_path / "e.embeddings.npy", tmp_path / "e.labels.npy", "--recall-at", "1", "2") == metrics


def test_runs_that_are_refused(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYDML_HOME", str(tmp_path / "home"))
    copy = tmp_path / "copy"
    shutil.copytree(base.run.path(), copy)
    steps = sorted({*Checkpoints(base.run).steps(), *Checkpoints(base.run).steps("best")})
    for arguments, says in (
        (["nothing"], f"'nothing' is neither a run folder nor a run in {tmp_path}/home/runs"),
        ([base.run, "--checkpoint", "3"], f"--checkpoint 3: expected best, last or one of the steps {steps}"),
        ([base.run, "--checkpoint", "newest"], "--checkpoint newest: expected best, last"),
        ([base.run, "--gallery", "a", "b"], "--gallery goes with arrays"),
        ([base.run, "--save", tmp_path / "no" / "such" / "e"], "cannot be written"),
    ):
        refused(arguments, says, capsys)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(
        yaml.safe_dump(
            config
            | {
                "evaluation": config["evaluation"] | {"checkpoint": "last"},
                "data": config["data"] | {"validation_fold": None},
            }
        )
    )
    refused([copy, "--split", "validation"], "the run has no validation images to evaluate", capsys)
    (copy / "run.json").write_text(json.dumps({"fingerprint": "other", "dataset": base.store.folder.uri}))
    refused([copy], f"has changed since the run (other -> {base.store.fingerprint})", capsys)
    (copy / "run.json").write_text(json.dumps({"fingerprint": "other", "dataset": "/gone"}))
    refused([copy], "no prepared dataset in /gone", capsys)
    shutil.rmtree(copy / "best")
    (copy / "run.json").write_text((Path(base.run.path()) / "run.json").read_text())
    refused([copy, "--checkpoint", "best"], "has no best checkpoint", capsys)
    shutil.rmtree(copy / "checkpoints")
    refused([copy, "--checkpoint", "last"], "has no checkpoint yet", capsys)


def test_a_damaged_image_of_the_dataset_is_named(base: Base, capsys: pytest.CaptureFixture) -> None:
    shard = next(s["file"] for s in base.store.manifest["shards"] if "test" in s["file"])
    path = Path(base.store.folder.path(shard))
    data = path.read_bytes()
    try:
        path.write_bytes(data[: len(data) // 3] + bytes(50) + data[len(data) // 3 + 50 :])
        refused([base.run], f"{shard} cannot be read", capsys)
    finally:
        path.write_bytes(data)


# ---- query and gallery -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """5 classes of which one image each asks and the others are searched, one class that nobody asks for."""
    root = tmp_path_factory.mktemp("split")
    images = write_images(root / "images", {f"c{i:02d}": 4 for i in range(14)}, seed=0)
    splits = ["train"] * 32 + [("query" if i % 4 == 0 else "gallery") for i in range(20)] + ["gallery"] * 4
    entries = [Entry(path, name, split) for (path, name), split in zip(images, splits, strict=True)]
    return write_store("split", entries, Folder(root / "store"), run_serially, num_folds=2)


def test_query_and_gallery_have_one_numbering_of_classes(split_store: Store) -> None:
    task = task_of(tiny_config("/nowhere", split_store.folder.uri), split_store)
    assert (len(task.queries), len(task.gallery)) == (5, 19)
    for side in (task.queries, task.gallery):
        for i, label in zip(side.ids, side.labels, strict=True):
            own = split_store.class_name_of[int(split_store.label[split_store.sample_id == i][0])]
            assert task.gallery.class_names[label] == own == task.queries.class_names[label]


def test_a_run_on_query_and_gallery(
    split_store: Store, measure: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """And under the paper protocol, which has no validation fold and says on what it chose."""
    changes = {"protocol": "paper", "data.validation_fold": None, "length": "2 steps", "evaluation.every": "1 steps"}
    recipe = tmp_path / "recipe.yaml"

    def command(clustering: bool) -> int:
        values = tiny_values(str(tmp_path), split_store.folder.uri, changes | {"evaluation.clustering": clustering})
        recipe.write_text(yaml.safe_dump(values))
        return train.main([str(recipe)])

    assert command(True) == 2, "one query a class: nothing to cluster, which is told before training"
    assert (
        "a clustering needs at least 2 classes and fewer classes than queries, there are 5 and 5"
        in capsys.readouterr().err
    )
    assert not any(contents(tmp_path / "runs").values())
    assert command(False) == 0
    capsys.readouterr()
    run = tmp_path / "runs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final"]["queries"] == 5 and summary["protocol"]["checkpoint"] == "best by map@r on the TEST classes"
    assert {k: round(v, 4) for k, v in measure(run).items()} == summary["final"]
    neighbours = np.load(run / "test_neighbours.npz")
    task = task_of(tiny_config("/nowhere", split_store.folder.uri), split_store)
    assert set(neighbours["query"]) == set(task.queries.ids) and set(neighbours["neighbours"].ravel()) <= {
        *task.gallery.ids,
        -1,
    }


def test_a_method_may_let_the_test_images_look_at_each_other(
    base: Base, measure: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`refine` gets the embeddings of all images of the task together, and what it returns is measured."""
    labels = torch.from_numpy(base.store.select(["test"]).labels)
    table = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen: list[torch.Tensor] = []

    def refine_embeddings(self: Baseline, embeddings: torch.Tensor) -> torch.Tensor:
        seen.append(embeddings)
        return table

    monkeypatch.setattr(Baseline, "refine_embeddings", refine_embeddings)
    assert measure(base.run, "--recall-at", "1", "2") == retrieve(table, labels).summary((1, 2))
    assert seen[0].shape == (len(labels), 8)


def test_queries_and_gallery_are_refined_together(
    split_store: Store, measure: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(tiny_config("/nowhere", split_store.folder.uri), split_store)
    table = torch.randn(24, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(Baseline, "refine_embeddings", lambda self, embeddings: table)
    changes = {"length": "1 steps", "evaluation.clustering": False, "evaluation.checkpoint": "last"}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(tiny_values(str(tmp_path), split_store.folder.uri, changes | {"data.validation_fold": None}))
    )
    assert train.main([str(tmp_path / "recipe.yaml")]) == 0
    y, gy = (torch.from_numpy(s.labels) for s in (task.queries, task.gallery))
    expected = retrieve(table[:5], y, gallery=table[5:], gallery_labels=gy).summary((1, 2))
    final = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())["final"]
    assert final == {k: round(v, 4) for k, v in expected.items()}


# ---- embeddings to files ---------------------------------------------------------------------------------------------


def embedded(target: Folder) -> dict[str, Any]:
    """All parts as one table; the files are whole."""
    found = target.read_json("_embeddings.json")
    files = [io.BytesIO(target.read(name)) for name in target.names() if name.startswith("part-")]
    assert found["complete"] and len(files) == found["parts"]
    table = pa.concat_tables([pq.read_table(f, page_checksum_verification=True) for f in files])
    assert len(table) == found["rows"] and table.schema.field("embedding").type.list_size == found["dim"]
    return {name: table[name].to_pylist() for name in table.column_names} | {"found": found}


@pytest.mark.parametrize(("split", "splits"), [("test", ["test"]), ("train", ["train"]), ("all", ["train", "test"])])
def test_embeddings_of_a_split(
    split: str, splits: list[str], base: Base, folder: Folder, monkeypatch: Any, capsys: Any
) -> None:
    """The embeddings that are measured, each with its sample, class and split, over several files."""
    monkeypatch.setattr(embed, "ROWS_PER_FILE", 7)
    assert (
        evaluate.main(
            [base.run.uri, "--embed-to", folder.uri, "--split", split, "--workers", "0", "--checkpoint", "last"]
        )
        == 0
    )
    rows = embedded(folder)
    store = base.store
    wanted = np.flatnonzero(np.isin(store.split, splits))
    assert rows["sample_id"] == store.sample_id[wanted].tolist() and rows["label"] == store.label[wanted].tolist()
    assert rows["class_name"] == [store.class_name_of[label] for label in rows["label"]]
    assert rows["source"] == store.sources(store.sample_id[wanted]) and all(Path(p).is_file() for p in rows["source"])
    assert rows["split"] == store.split[wanted].tolist() and len(set(rows["split"])) == len(splits)
    assert rows["found"]["parts"] == -(-len(wanted) // 7) > 1
    embedder, trunk, method = trained_model.load_run(base.run.uri, "last").load(store, torch.device("cpu"))
    expected = embedder(store.sample_id[wanted], trunk, method)
    torch.testing.assert_close(torch.tensor(rows["embedding"], dtype=expected.dtype), expected, rtol=1e-5, atol=1e-6)
    assert f"{len(wanted)} embeddings" in capsys.readouterr().out


def test_embedding_is_continued(base: Base, tmp_path: Path, monkeypatch: Any) -> None:
    """After a kill between two parts the parts that are there stay; other embeddings are never mixed in."""
    monkeypatch.setattr(embed, "ROWS_PER_FILE", 7)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    arguments = [base.run.uri, "--embed-to", str(tmp_path / "out"), "--workers", "0", "--checkpoint", "last"]
    original, calls = embed.EmbedTask.__call__, []

    def dies(self: embed.EmbedTask, part: range) -> dict[str, Any]:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(part)
        return original(self, part)

    with monkeypatch.context() as patched:
        patched.setattr(embed.EmbedTask, "__call__", dies)
        assert evaluate.main(arguments) == 130
    assert not json.loads((tmp_path / "out" / "_embeddings.json").read_text())["complete"]
    first = (tmp_path / "out" / "part-000000000.parquet").stat()
    assert evaluate.main(arguments) == 0
    rows = embedded(Folder(tmp_path / "out"))
    assert rows["sample_id"] == base.store.sample_id[base.store.split == "test"].tolist()
    assert (tmp_path / "out" / "part-000000000.parquet").stat().st_mtime_ns == first.st_mtime_ns
    before = contents(tmp_path / "out")
    assert evaluate.main(arguments) == 0 and contents(tmp_path / "out") == before
    manifest = tmp_path / "out" / "_embeddings.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"complete": False}))
    assert evaluate.main(arguments) == 0 and contents(tmp_path / "out") == before  # killed before the last word


def test_refused_embeddings(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "out"
    arguments: list[str | Path] = [base.run.uri, "--embed-to", target, "--workers", "0"]
    assert evaluate.main([*map(str, arguments), "--checkpoint", "last"]) == 0
    capsys.readouterr()
    refused([*arguments, "--checkpoint", "last", "--split", "train"], "choose another folder", capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    refused([base.run.uri, "--embed-to", tmp_path / "full", "--workers", "0"], "is not empty", capsys)
    refused([*arguments, "--split", "validation"], "a part of the training images", capsys)
    refused([*arguments, "--clustering"], "goes with one run", capsys)
    refused([*arguments[:-1], "-1"], "--workers is -1", capsys)
    refused([base.run.uri, "--workers", "1"], "go with --embed-to", capsys)
    refused([base.run.uri, "--split", "all"], "go with --embed-to", capsys)


@pytest.mark.parametrize("complete", [True, False])
def test_embeddings_of_another_network_of_the_same_name_are_refused(
    complete: bool, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As after training anew in the same folder, with as many steps."""
    run = Folder(shutil.copytree(base.run.path(""), tmp_path / "run"))
    target = Folder(tmp_path / "out")
    arguments: list[str | Path] = [run.uri, "--embed-to", target.uri, "--workers", "0", "--checkpoint", "last"]
    assert evaluate.main([str(a) for a in arguments]) == 0
    manifest = target.read_json("_embeddings.json")
    target.write_json("_embeddings.json", manifest | {"complete": complete})
    name = f"{manifest['checkpoint']}/checkpoint.json"
    record = run.read_json(name)
    record["sha256"]["trunk.safetensors"] = hashlib.sha256(b"another").hexdigest()
    run.write_json(name, record)
    capsys.readouterr()
    refused(arguments, "of other weights or images", capsys)
