"""`python -m pipeline.train` in this process: what a run leaves behind, and how it ends."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from methods import Baseline
from pipeline import train
from pipeline.config import build_config
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder
from pipeline.training import start
from tests.pipeline.conftest import Base, contents
from tests.pipeline.training.conftest import Train, assert_one_error

pytestmark = pytest.mark.usefixtures("fresh_readers")


def test_what_a_run_leaves(base: Base) -> None:
    kinds = [(line["kind"], line["step"]) for line in read_metrics(base.run)]
    steps = max(step for _, step in kinds)
    assert kinds[0] == ("frozen", 0) and kinds[-1] == ("test", steps)
    assert [s for k, s in kinds if k == "train"] == list(range(1, steps + 1)), "log_every: 1"
    assert [s for k, s in kinds if k == "validation"] == [steps // 2, steps]
    summary = base.run.read_json("summary.json")
    progress = Checkpoints(base.run).latest()
    assert progress.finished and progress.step == steps and summary["step"] == steps and progress.epoch == 2
    best = max(
        (line for line in read_metrics(base.run) if line["kind"] == "validation"), key=lambda line: line["map@r"]
    )
    assert progress.best_step == best["step"] and summary["validation"]["map@r"] == round(best["map@r"], 4)
    assert summary["protocol"]["trained_on"] == "training classes without fold 0" and summary["reproducible"]
    assert summary["images"] == 12 * steps and summary["final"]["queries"] == 28
    assert {"recall@1", "map@r", "r_precision", "nmi", "ami"} <= set(summary["final"]) and "nmi" not in summary[
        "frozen"
    ]
    config = build_config(yaml.safe_load(base.run.read("config.yaml")))
    assert config.runtime.cpus_per_worker == 1 and config.storage == str(base.root)
    recorded = base.run.read_json("run.json")
    recorded.pop("plugin_folders", None)  # where a test before this one, in the same process, had code of its own
    assert recorded == {
        "fingerprint": base.store.fingerprint,
        "dataset": base.store.folder.uri,
        "classes": len({int(v) for v in base.store.label[(base.store.split == "train") & (base.store.fold != 0)]}),
    }
    assert base.run.exists("report.html") and base.run.names("tensorboard")


def test_a_finished_run_shows_its_summary_again_without_training(
    run: Train, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = base.files()
    modified = {p: p.stat().st_mtime_ns for p in Path(base.run.path()).rglob("*") if p.is_file()}
    monkeypatch.setattr(start, "run_in_process", lambda *_: pytest.fail("it was started again"))
    status, out, err = run()
    assert status == 0 and err == "done: loading PyTorch ...\n"
    final = base.run.read_json("summary.json")["final"]
    assert (
        "done: retrieval on classes never seen in training" in out
        and f"{final['recall@1']:.2f}" in out
        and "28 queries" in out
    )
    assert f"report: {base.run}/report.html" in out
    assert base.files() == before and all(p.stat().st_mtime_ns == at for p, at in modified.items())


def test_each_validation_is_one_line_and_the_best_is_marked(run: Train, base: Base) -> None:
    status, _, err = run(name="told", length="3 epochs")
    assert status == 0
    lines = [line for line in err.splitlines() if line.startswith("validation at step ")]
    logged = [line for line in read_metrics(Folder(base.root / "runs" / "told")) if line["kind"] == "validation"]
    best = -1.0
    for line, metrics in zip(lines, logged, strict=True):
        first = f"validation at step {metrics['step']} (epoch {metrics['epoch']:.2f}): map@r {metrics['map@r']:.2f}, recall@1 "
        assert line.startswith(first) and line.endswith("  * best so far") == (metrics["map@r"] > best)
        best = max(best, metrics["map@r"])
    shutil.rmtree(base.root / "runs" / "told")


def test_single_images_are_announced(run: Train, base: Base) -> None:
    store = base.store
    fold = int(store.fold[[store.class_name_of[int(label)] == "train_single" for label in store.label]][0])
    status, _, err = run(name="singles", length="1 steps", data__validation_fold=(fold + 1) % 4)
    assert status == 0
    assert "1 training classes have one image each (first: train_single): used as negatives only" in " ".join(
        err.split()
    )
    shutil.rmtree(base.root / "runs" / "singles")


def test_a_split_that_is_not_copied_is_announced(run: Train, base: Base) -> None:
    status, _, err = run(name="uncopied", length="1 steps", cache__max_bytes=1)
    assert status == 0 and "images are read from the store in every epoch" in " ".join(err.split())
    shutil.rmtree(base.root / "runs" / "uncopied")


def test_fresh_starts_over_and_repeats_every_bit(run: Train, base: Base) -> None:
    first = contents(Path(base.run.path()))
    lines = [
        {k: v for k, v in line.items() if k not in ("images_per_second", "waiting")} for line in read_metrics(base.run)
    ]
    (base.root / "runs" / "done" / "notes.txt").write_text("of the run before")
    status, _, _ = run("--fresh")
    again = contents(Path(base.run.path()))
    assert status == 0 and "notes.txt" not in again
    assert again["incarnation"].strip() == b"1"
    tensors = [name for name in first if name.endswith(".safetensors")]
    assert len(tensors) >= 4 and all(first[name] == again[name] for name in tensors)
    assert [
        {k: v for k, v in line.items() if k not in ("images_per_second", "waiting")} for line in read_metrics(base.run)
    ] == lines


def parameters(run: Folder, step: int) -> dict[str, torch.Tensor]:
    base = f"{run.path()}/checkpoints/step-{step:08d}"
    return load_file(f"{base}/trunk.safetensors") | load_file(f"{base}/method.safetensors")


def test_a_loss_that_is_not_finite_ends_the_run_with_a_good_checkpoint(
    run: Train, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Baseline.loss

    def broken(self: Baseline, embeddings: torch.Tensor, labels: torch.Tensor, context: Any) -> torch.Tensor:
        loss = original(self, embeddings, labels, context)
        return loss * float("nan") if context.clock.step == 5 else loss

    monkeypatch.setattr(Baseline, "loss", broken)
    outcome = run(name="nan")
    assert_one_error(outcome, 1, "the loss is not finite at step 5 (nan on rank 0): no update was applied")
    folder = Folder(base.root / "runs" / "nan")
    saved = Checkpoints(folder).latest()
    assert 0 < saved.step <= 5 and not saved.finished
    assert all(t.isfinite().all() for t in parameters(folder, saved.step).values())
    assert not folder.exists("summary.json")
    monkeypatch.undo()
    assert run(name="nan")[0] == 0, "the checkpoint can be continued from"
    assert parameters(folder, 8).keys() == parameters(base.run, 8).keys()
    assert all(torch.equal(t, parameters(base.run, 8)[n]) for n, t in parameters(folder, 8).items()), (
        "as if nothing had happened"
    )
    shutil.rmtree(folder.path())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "not finite at step"),
        ({"checkpoint.every": "1 steps"}, "not finite"),
        ({"evaluation.every": "1 steps"}, "not finite"),
    ],
)
def test_a_learning_rate_that_explodes(
    changes: dict[str, Any], says: str, run: Train, base: Base, exploded: Folder
) -> None:
    settings = {
        "name": "explode",
        "method.optimizer.lr": 1e30,
        "precision": "float32",
        "model.batch_norm": "frozen",
        **changes,
    }
    assert_one_error(run(**{k.replace(".", "__"): v for k, v in settings.items()}), 1, says)


def test_parameters_that_are_not_finite_are_never_saved(
    run: Train, monkeypatch: pytest.MonkeyPatch, exploded: Folder
) -> None:
    """A finite loss may have a gradient that is not."""
    original = Baseline.training_step

    def broken(self: Baseline, batch: Any, context: Any) -> dict[str, float]:
        logs = original(self, batch, context)
        if context.clock.step == 2:
            self.head.linear.bias.data[0] = float("inf")
        return logs

    monkeypatch.setattr(Baseline, "training_step", broken)
    outcome = run(name="explode", checkpoint__every="1 steps")
    assert_one_error(outcome, 1, " tensors are not finite at step 3 (first: method.head.linear.bias)")
    assert Checkpoints(exploded).steps() == [1, 2]


@pytest.fixture
def exploded(base: Base) -> Iterator[Folder]:
    """The run of that name; all that it has saved is finite."""
    folder = Folder(base.root / "runs" / "explode")
    yield folder
    steps = Checkpoints(folder).steps()
    finite = [bool(t.isfinite().all()) for step in steps for t in parameters(folder, step).values()]
    shutil.rmtree(folder.path())
    assert finite and all(finite)


def test_everything_in_object_storage(bucket: str, run: Train, base: Base, tmp_path: Path) -> None:
    """Dataset and run folder: the same weights, a second start that only shows the summary, a dataset that is damaged."""
    source = Folder(bucket) / "data" / "tiny"
    for name in ("manifest.json", "catalog.parquet", *(s["file"] for s in base.store.manifest["shards"])):
        source.write(name, base.store.folder.read(name))
    settings = {"storage": bucket, "data__source": source.uri, "cache__folder": str(tmp_path / "cache")}
    assert run(**settings)[0] == 0
    remote = Folder(bucket) / "runs" / "done"
    for name in (n for n in contents(Path(base.run.path())) if n.endswith(".safetensors")):
        assert remote.read(name) == base.run.read(name)
    assert remote.exists("report.html") and remote.names("tensorboard")
    assert [line["kind"] for line in read_metrics(remote)] == [line["kind"] for line in read_metrics(base.run)]
    sizes = {n: remote.size(n) for n in ("metrics.jsonl", "summary.json")}
    status, out, _ = run(**settings)
    assert status == 0 and f"report: {remote}/report.html" in out
    assert {n: remote.size(n) for n in sizes} == sizes and remote.read_json("incarnation") == 1
    shard = base.store.manifest["shards"][0]["file"]
    source.remove(shard)
    assert_one_error(run(**settings, length="3 epochs"), 2, f"shard {source}/{shard} is missing")


def test_a_process_that_lost_its_run_leaves_the_log_alone(
    bucket: str, run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In object storage it keeps a copy of its own, which must not replace what the newer process has written."""
    save = Checkpoints.save

    def taken_over(self: Checkpoints, kind: str, progress: Any, *others: Any) -> None:
        if progress.step:
            self.run.write_json("incarnation", self.incarnation + 1)
            self.run.write("metrics.jsonl", b"of the newer process")
        save(self, kind, progress, *others)

    monkeypatch.setattr(Checkpoints, "save", taken_over)
    assert_one_error(run(storage=bucket, cache__folder=str(tmp_path / "cache")), 1, "another process (attempt")
    assert (Folder(bucket) / "runs" / "done").read("metrics.jsonl") == b"of the newer process"


def test_a_run_that_only_chooses_leaves_the_test_classes_alone(base: Base) -> None:
    recipe = base.recipe({"name": "chooses", "evaluation.test": False})
    assert train.main([recipe]) == 0
    folder = Folder(base.root / "runs" / "chooses")
    kinds = {line["kind"] for line in read_metrics(folder)}
    assert kinds == {"train", "validation"}
    summary = folder.read_json("summary.json")
    assert summary["final"] == {} and summary["validation"]["recall@1"] >= 0
    folder.remove()
