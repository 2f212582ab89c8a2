"""Figures of the frozen network are computed once and shared by the runs that they are of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, build_config
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values
from pipeline.testing.watched_run import make_worker
from pipeline.training import measurements
from pipeline.training.frozen_figures import FOLDER, _digest, frozen_figures
from tests.pipeline.conftest import Base
from tests.pipeline.training.conftest import Train
from tests.pool import Pool

pytestmark = pytest.mark.usefixtures("fresh_readers")


@pytest.fixture
def kept(base: Base) -> Iterator[Path]:
    """The folder of the figures, with those of the finished run alone; other runs of a test are removed."""
    for file in (base.root / FOLDER).iterdir():
        if file.name not in base.figures:
            file.unlink()
    yield base.root / FOLDER
    for run in (base.root / "runs").iterdir():
        if run.name != "done":
            shutil.rmtree(run)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one whenever a network without a method is measured."""
    found: list[None] = []
    evaluate = measurements.evaluate

    def counted(task: Any, embedder: Any, trunk: Any, method: Any, *arguments: Any) -> Any:
        found.extend([None] * (method is None))
        return evaluate(task, embedder, trunk, method, *arguments)

    monkeypatch.setattr(measurements, "evaluate", counted)
    return found


def of(kept: Path, fold: int | None) -> Path:
    """The file of a validation fold, or of the test classes."""
    (file,) = (
        f
        for f in kept.iterdir()
        if json.loads(f.read_text())["of"]["images"][2:] == ([] if fold is None else [f"fold {fold}"])
    )
    return file


def frozen(run: Folder) -> tuple[dict[str, float], dict[str, Any], dict[str, float]]:
    """The figures in a run's state, log and summary."""
    latest = Checkpoints(run).latest()
    assert latest is not None
    return latest.frozen, read_metrics(run)[0], run.read_json("summary.json")["frozen"]


def weights(run: Folder) -> dict[str, bytes]:
    step = Checkpoints(run).steps()[-1]
    files = ("trunk.safetensors", "method.safetensors", "optimizers.pt")
    return {name: run.read(f"checkpoints/step-{step:08d}/{name}") for name in files}


def test_a_second_run_takes_the_same_figures_and_trains_the_same(
    run: Train, base: Base, kept: Path, computed: list[None]
) -> None:
    status, _, err = run(name="second")
    second = Folder(base.root / "runs" / "second")
    assert status == 0 and not computed and len(list(kept.iterdir())) == 2
    assert all(
        f"figures of the frozen network on {on} taken from {of(kept, fold)}\n" in err
        for on, fold in (("the test classes", None), ("fold 0", 0))
    )
    latest, of_base = Checkpoints(second).latest(), Checkpoints(base.run).latest()
    assert latest is not None and of_base is not None and latest.frozen_validation == of_base.frozen_validation != {}
    assert second.read_json("summary.json")["frozen_validation"].keys() == latest.frozen.keys()
    assert frozen(second) == frozen(base.run) and weights(second) == weights(base.run)
    assert [type(v) for v in frozen(second)[0].values()] == [type(v) for v in frozen(base.run)[0].values()]


def test_a_run_that_trains_otherwise_takes_them(run: Train, base: Base, kept: Path, computed: list[None]) -> None:
    status, _, _ = run(name="other", length="1 steps", method__optimizer__lr=0.1, data__transforms__jitter=0.0,
                       method__embedding_dim=4)  # fmt: skip
    assert status == 0 and not computed and len(list(kept.iterdir())) == 2
    assert frozen(Folder(base.root / "runs" / "other")) == frozen(base.run)


def test_another_fold_is_measured_alone(run: Train, base: Base, kept: Path, computed: list[None]) -> None:
    assert run(name="other", length="1 steps", data__validation_fold=1)[0] == 0 and len(computed) == 1
    other, of_base = (Checkpoints(Folder(base.root / "runs" / name)).latest() for name in ("other", "done"))
    assert other is not None and of_base is not None and other.frozen == of_base.frozen
    assert other.frozen_validation == json.loads(of(kept, 1).read_text())["metrics"] != of_base.frozen_validation


def test_training_that_makes_it_worse_is_told_at_once(run: Train, base: Base, kept: Path, computed: list[None]) -> None:
    """The backbone's figures on the fold are raised: any validation is below."""
    file = of(kept, 0)
    good = file.read_text()
    record = json.loads(good)
    metrics = {name: 100.0 for name in record["metrics"]}
    record |= {"metrics": metrics, "sha256": _digest([record["of"], metrics])}
    file.write_text(json.dumps(record))
    try:
        status, out, err = run(name="worse")
    finally:
        file.write_text(good)
    lines = err.splitlines()
    told = [i for i, line in enumerate(lines) if "below the 100.00 of the backbone before training" in line]
    first = next(i for i, line in enumerate(lines) if line.startswith("validation at step"))
    assert status == 0 and not computed and told == [first + 1], "once, after the first validation"
    assert "model.head_first" in lines[told[0]] and "warning: training made it worse" in out


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},  # other weights
        {"model.pooling": "max"},
        {"model.batch_norm": "frozen"},
        {"model.mean": [0.4, 0.4, 0.4]},
        {"data.transforms.squash": True},
        {"data.transforms.evaluation_scale": 1.5},
        {"evaluation.recall_at": [1, 4]},
        {"evaluation.distance": "euclidean"},
        {"evaluation.batch_size": 3},
        {"precision": "float32"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_figures_changes_the_file(base: Base, change: dict[str, Any], pool: Pool) -> None:
    assert (
        len({pool(name_of, 1, base.root, base.store.folder.uri, c)[0] for c in ({}, change, {"length": "9 epochs"})})
        == 2
    )


def test_another_number_of_workers_computes_them_itself(base: Base, pool: Pool) -> None:
    names = [pool(name_of, world, base.root, base.store.folder.uri, {})[0] for world in (1, 2)]
    assert names[0] != names[1]


def test_code_of_a_users_own_is_not_shared(base: Base, pool: Pool) -> None:
    own = {"model.backbone": "timm.models.efficientnet:test_efficientnet"}
    own |= {"model.backbone_args": {"num_classes": 0, "global_pool": ""}}
    assert pool(name_of, 1, base.root, base.store.folder.uri, own) == [None]


def config_of(root: Path, store: str, changes: dict[str, Any]) -> Config:
    return build_config(tiny_values(str(root), store, changes))


def name_of(rank: int, world: int, root: Path, store: str, changes: dict[str, Any]) -> str | None:
    worker = make_worker(config_of(root, store, changes), rank, (1,) * world)
    figures = frozen_figures(worker.config, worker.store, worker.embedder, worker.trunk)
    return None if figures is None else figures.name


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff\xfe", "digit"], ids=repr)
def test_a_damaged_file_is_told_and_replaced(
    run: Train, base: Base, kept: Path, computed: list[None], damage: bytes | str
) -> None:
    file = of(kept, None)
    good = file.read_bytes()
    record = json.loads(good)
    record["metrics"]["map@r"] += 1.0
    file.write_bytes(json.dumps(record).encode() if isinstance(damage, str) else damage)
    status, _, err = run(name="damaged", length="1 steps")
    assert status == 0 and len(computed) == 1 and file.read_bytes() == good
    assert [line for line in err.splitlines() if "is damaged and computed again" in line and str(file) in line]
    assert frozen(Folder(base.root / "runs" / "damaged")) == frozen(base.run)


def test_figures_that_cannot_be_kept_are_told(run: Train, base: Base, kept: Path, computed: list[None]) -> None:
    kept.rename(base.root / "aside")
    try:
        kept.write_text("a file")
        status, _, err = run(name="unkept", length="1 steps")
        assert status == 0 and len(computed) == 2
        assert "figures of the frozen network cannot be kept for other runs" in err
    finally:
        kept.unlink()
        (base.root / "aside").rename(kept)


def test_a_run_without_test_classes_measures_its_fold(run: Train, base: Base, kept: Path, computed: list[None]) -> None:
    status, _, err = run(name="untested", length="1 steps", evaluation__test=False, seed=9)
    assert status == 0 and len(computed) == 1 and len(list(kept.iterdir())) == 3 and "frozen network" not in err


def measure_twice(rank: int, world: int, root: Path, store: str) -> list[dict[str, float]]:
    """The first rank alone has the storage; the second time nobody may compute."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for _ in range(2):
            worker = make_worker(config_of(root / str(rank), store, {"name": f"r{rank}"}), rank, (2, 1))
            worker.checkpoints.acquire()
            worker.measurements.frozen(worker.progress, None)
            found.append(
                worker.progress.frozen | {f"fold/{k}": v for k, v in worker.progress.frozen_validation.items()}
            )
            patch.setattr(measurements, "evaluate", None)
    return found


@pytest.mark.cluster
def test_one_rank_reads_for_all(base: Base, tmp_path: Path, pool: Pool) -> None:
    (first, again), (other, other_again) = pool(measure_twice, 2, tmp_path, base.store.folder.uri)
    assert first == again == other == other_again and first["map@r"] > 0 < first["fold/map@r"]
    assert len(list((tmp_path / "0" / FOLDER).iterdir())) == 2 and not (tmp_path / "1" / FOLDER).exists()
