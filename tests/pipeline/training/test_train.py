"""`python -m pipeline.train` in this process: what is refused, in one line, before anything starts."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline import evaluate, train
from pipeline.data.entries import Entry
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.runs.run_folder import read_changes
from pipeline.runs.tracking import Tracker
from pipeline.storage import Folder
from pipeline.testing.tiny import write_images, write_tiny_store
from tests.pipeline.conftest import Base, contents
from tests.pipeline.training.conftest import Train, assert_one_error

pytestmark = pytest.mark.usefixtures("fresh_readers")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt key": ({"method.optimizer.lrr": 1}, "unknown key 'method.optimizer.lrr': did you mean 'method.optimizer.lr'?"),
    "impossible value": ({"seed": -1}, "seed: got -1"),
    "P larger than the classes": ({"method.classes_per_batch": 40}, "classes_per_batch is 40, but the training set can fill only 9 groups"),
    "fold that is not there": ({"data.validation_fold": 7}, "data.validation_fold is 7, the dataset has the folds 0 to 3"),
    "unknown backbone": ({"model.backbone": "test_resnett"}, "did you mean 'test_resnet'"),
    "missing weights": ({"model.weights": "/nowhere.pth"}, "no such file"),
    "image size": ({"model.backbone": "test_vit", "model.pooling": "native"}, "data.transforms.size is 24: set it to 16 or 32"),
    "missing dataset": ({"data.source": "/no/such/place"}, "there is no prepared dataset in /no/such/place: prepare it with"),
    "dataset by a name that is not there": ({"data.source": "cub"}, "there is no dataset 'cub' in "),
    "best weights, but nothing to choose them on": ({"method": {"name": "intra_batch", "reload_best": [1]}, "data.validation_fold": None, "evaluation.checkpoint": "last"}, "there is nothing to choose them on"),
    "dataset in a missing bucket": ({"data.source": "s4://nowhere/x"}, "cannot be opened"),
    "re-ranking without cameras": ({"evaluation.reranking": {"k1": 5}}, "is leave_one_out: leave them out"),
    "distractors without cameras": ({"evaluation.distractors": "junk"}, "is leave_one_out: leave them out"),
    "folder of images": ({"data.source": os.path.dirname(__file__)}, f"is no prepared dataset: prepare the images in it with `python -m pipeline.prepare folder {os.path.dirname(__file__)}`"),
    "relative storage without datasets": ({"storage": "here/and/there", "data.source": "birds"}, f"there is no dataset 'birds' in {os.getcwd()}/here/and/there/data"),
    "too many threads": ({"runtime.cpus_per_worker": 4 * (os.cpu_count() or 1) + 1}, "threads requested (runtime.workers × cpus_per_worker)"),
    "too many workers": ({"runtime.workers": 500, "runtime.cpus_per_worker": 2}, "1000 threads requested"),
    "GPUs": ({"runtime.gpus_per_worker": torch.cuda.device_count() + 1, "precision": "float32"}, "GPUs requested"),
}  # fmt: skip


@pytest.mark.parametrize("fresh", [False, True], ids=["", "fresh"])
@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_touches_nothing(name: str, fresh: bool, run: Train, base: Base) -> None:
    """Also with --fresh: the earlier run is removed when everything else has been checked."""
    changes, says = REFUSED[name]
    before = base.files()
    for run_name in ("done", "new") if fresh else ("new",):
        outcome = run(
            *(["--fresh"] if fresh else []),
            **{k.replace(".", "__"): v for k, v in ({"name": run_name} | changes).items()},
        )
        assert_one_error(outcome, 2, says)
    assert base.files() == before


@pytest.mark.parametrize("what", ["checkpoint", "log", "summary"])
def test_a_full_disk_is_one_line_and_the_run_continues_when_there_is_room(
    what: str, run: Train, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, write, log = f"full-{what}", Folder.write, Tracker.log
    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(self: Folder, file: str, data: bytes) -> None:
        if (what == "checkpoint" and "step-00000004" in file) or (what == "summary" and file == "summary.json"):
            raise no_space
        write(self, file, data)

    def full_log(self: Tracker, step: int, kind: str, values: Any) -> None:
        if what == "log" and step == 5:
            raise no_space
        log(self, step, kind, values)

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "write", full)
        patched.setattr(Tracker, "log", full_log)
        outcome = run(name=name, length="2 epochs", checkpoint={"every": "2 steps"})
    assert_one_error(outcome, 1, "No space left on device")
    assert "kept" in outcome[2] and "run the same command again" in outcome[2]
    assert run(name=name, length="2 epochs", checkpoint={"every": "2 steps"})[0] == 0
    Folder(base.root / "runs" / name).remove()  # other tests share the storage


@pytest.mark.parametrize("what", ["below a file", "missing bucket"])
def test_unwritable_storage(what: str, run: Train, base: Base, request: pytest.FixtureRequest) -> None:
    if what == "missing bucket":
        request.getfixturevalue("bucket")
    storage = f"{base.root}/recipe.yaml/x" if what == "below a file" else "s3://no-such-bucket"
    assert_one_error(run(storage=storage), 2, f"storage '{storage}/runs/done' is not writable")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method.optimizer.lr": 0.5}, "run {run} exists with another config (method.optimizer.lr: 0.003 -> 0.5): replace it with --fresh, or give this one another name (name=auto makes one); as a run of its own: python -m pipeline.train "),
        ({"seed": 4, "data.transforms.flip": 1.0, "precision": "float32"}, "data.transforms.flip: 0.5 -> 1.0; precision: float64 -> float32; seed: 3 -> 4"),
        ({"data.source": "{other}"}, "data.source: "),
        ({"seed": 4, "model.backbone": "test_resnett"}, "did you mean 'test_resnet'"),  # what is wrong in itself goes first
        ({"seed": 4, "data.source": "birds"}, "there is no dataset 'birds' in "),
        ({"seed": 4, "data.validation_fold": 9}, "data.validation_fold is 9, the dataset has the folds 0 to 3"),
        ({"length": "1 epochs"}, "has length 2 epochs, got 1 epochs: length may only grow, in the same unit"),
        ({"length": "900 steps"}, "length may only grow, in the same unit"),
    ],
)  # fmt: skip
def test_a_run_does_not_become_another(
    changes: dict[str, Any], says: str, run: Train, base: Base, store: Store
) -> None:
    before = base.files()
    changes = {k: v.format(other=store.folder.uri) if isinstance(v, str) else v for k, v in changes.items()}
    assert_one_error(run(**{k.replace(".", "__"): v for k, v in changes.items()}), 2, says.format(run=base.run))
    assert base.files() == before


def test_the_command_that_is_told_trains_it_as_a_run_of_its_own(run: Train, base: Base) -> None:
    _, _, err = run(seed=4, length="1 steps", evaluation__test=False)
    command = shlex.split(err.strip().rpartition("as a run of its own: ")[2])
    assert command[:3] == ["python", "-m", "pipeline.train"] and command[-1] == "name=done-test_False-seed_4"
    before = contents(Path(base.run.uri))
    assert train.main(command[3:]) == 0
    assert contents(Path(base.run.uri)) == before
    Folder(base.root / "runs" / "done-test_False-seed_4").remove()  # other tests share the storage


def test_relative_storage_is_refused_on_a_cluster(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert_one_error(run(storage="here"), 2, "storage 'here' is a relative path, which every node of a cluster")


@pytest.fixture
def older(base: Base) -> Iterator[Callable[[dict[str, Any]], Folder]]:
    """A copy of the finished run, "older", with the changes (by dotted key; None: taken out) to its config.yaml."""
    folder = Folder(shutil.copytree(base.run.path(), base.root / "runs" / "older"))

    def write(changes: dict[str, Any]) -> Folder:
        config = yaml.safe_load(folder.read("config.yaml")) | {"name": "older"}
        for key, value in changes.items():
            *parents, last = key.split(".")
            section = config
            for parent in parents:
                section = section[parent]
            section.pop(last, None)
            if value is not None:
                section[last] = value
        folder.write("config.yaml", yaml.safe_dump(config).encode())
        return folder

    yield write
    folder.remove()


def test_a_run_of_a_version_with_fewer_keys_continues(run: Train, base: Base, older: Callable[..., Folder]) -> None:
    later = ["mining", "data.transforms.flip", "method.optimizer.weight_decay", "evaluation.distractors", "model.std"]
    folder = older({key: None for key in [*later, "runtime.max_failures"]})
    before = base.files()
    assert_one_error(run(name="older", seed=4), 2, "exists with another config (seed: 3 -> 4)")
    assert_one_error(run(name="older", data__transforms__flip=0.25), 2, "(data.transforms.flip: 0.5 -> 0.25)")
    assert base.files() == before
    status, _, err = run(name="older", length="3 epochs")
    assert status == 0 and "resumed at step 8" in err
    assert [line["changes"] for line in read_changes(folder)] == [["length: 2 epochs -> 3 epochs"]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mining.rebuild": 3}, "unknown key 'mining.rebuild': did you mean 'mining.rebuild_every'?"),
        ({"evaluation.metric": "accuracy"}, "evaluation: metric is 'accuracy', expected one of "),
    ],
    ids=["removed key", "removed value"],
)
def test_a_run_of_a_version_with_other_keys_is_refused(
    changes: dict[str, Any], says: str, run: Train, base: Base, older: Callable[..., Folder],
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    folder = older(changes)
    before = base.files()
    says = f"run {folder} was started by another version, this one does not accept its config.yaml ({says}"
    outcome = run(name="older")
    assert_one_error(outcome, 2, says)
    assert "use that version, or train again with another --set name=... or --fresh" in outcome[2]
    assert_one_error((evaluate.main([folder.uri]), *capsys.readouterr()), 2, says)
    assert base.files() == before


def test_checkpoints_of_an_unknown_config_are_not_continued(run: Train, base: Base) -> None:
    """What is left when --fresh is killed while it removes the earlier run."""
    shutil.copytree(base.root / "runs" / "done" / "checkpoints", base.root / "runs" / "rest" / "checkpoints")
    before = base.files()
    assert_one_error(run(name="rest"), 2, "has checkpoints but no config.yaml: start over with --fresh")
    assert base.files() == before
    shutil.rmtree(base.root / "runs" / "rest")


@pytest.fixture
def damaged(base: Base) -> Iterator[Folder]:
    """The run's dataset, which may be changed; put back afterwards."""
    path = Path(base.store.folder.path())
    shutil.copytree(path, f"{path}.kept")
    yield base.store.folder
    shutil.rmtree(path)
    os.rename(f"{path}.kept", path)


def test_another_dataset_in_the_same_place(run: Train, base: Base, damaged: Folder, tmp_path: Path) -> None:
    other = write_tiny_store(tmp_path, seed=1)
    damaged.remove()
    shutil.copytree(other.folder.path(), damaged.path())
    before = base.files()
    outcome = run(length="3 epochs")
    assert_one_error(
        outcome,
        2,
        f"was trained on a dataset of fingerprint {base.store.fingerprint}, {damaged} has {other.fingerprint}",
    )
    assert "another name or --fresh" in outcome[2] and base.files() == before


@pytest.mark.parametrize("damage", ["truncated shard", "missing shard", "newer format", "damaged catalogue"])
def test_a_damaged_dataset_is_noticed_before_training(damage: str, run: Train, base: Base, damaged: Folder) -> None:
    shard = base.store.manifest["shards"][1]
    says = shard["file"]
    if damage == "truncated shard":
        damaged.write(shard["file"], damaged.read(shard["file"])[:-1])
    elif damage == "missing shard":
        damaged.remove(shard["file"])
    elif damage == "newer format":
        damaged.write_json("manifest.json", base.store.manifest | {"format": 99})
        says = "has store format 99, this program reads format 1"
    else:
        damaged.write("catalog.parquet", damaged.read("catalog.parquet")[:-1])
        says = "catalog.parquet does not match its checksum"
    before = base.files()
    for changes in ({"length": "3 epochs"}, {"name": "new"}):
        assert_one_error(run(**changes), 2, says)
    assert base.files() == before


@pytest.mark.parametrize("cached", [True, False], ids=["copied", "by row group"])
def test_a_flipped_bit_ends_the_run_with_the_name_of_the_shard(
    cached: bool, run: Train, base: Base, damaged: Folder, tmp_path: Path
) -> None:
    shard = next(s for s in base.store.manifest["shards"] if "train" in s["file"])
    data = bytearray(damaged.read(shard["file"]))
    for at in range(len(data) // 4, len(data) // 2, 97):
        data[at] ^= 1
    damaged.write(shard["file"], bytes(data))
    before = contents(base.root / "runs" / "done")
    limit = {"cache.max_bytes": 10**9 if cached else 0, "cache.folder": str(tmp_path / "cache")}
    outcome = run(name="new", **{k.replace(".", "__"): v for k, v in limit.items()}, evaluation__clustering=False)
    assert_one_error(outcome, 1, f"shard {damaged}/{shard['file']} ")
    assert contents(base.root / "runs" / "done") == before
    shutil.rmtree(base.root / "runs" / "new")


def test_images_that_cannot_be_measured_are_told_before_training(run: Train, tmp_path: Path, base: Base) -> None:
    """Each once cost a whole training: test classes of one image, and a clustering of a single test class."""
    images = write_images(tmp_path, {f"c{i:02d}": 3 for i in range(10)}, seed=0)
    splits = {
        "none of the 3 queries has another image of its class": lambda i: (
            "train" if i < 18 else "query" if i < 21 else "gallery" if i < 24 else None
        ),
        "none of the 4 queries has another image of its class": lambda i: (
            "train" if i < 18 else "test" if i % 3 == 0 else None
        ),
        "all images are of one class, so that every answer is right": lambda i: (
            "train" if i < 18 else "test" if i < 21 else None
        ),
    }
    for number, (says, split_of) in enumerate(splits.items()):
        entries = [Entry(path, name, split_of(i)) for i, (path, name) in enumerate(images) if split_of(i)]
        made = write_store("x", entries, Folder(tmp_path / f"store{number}"), run_serially, num_folds=2)
        outcome = run(name="new", data__source=made.folder.uri, method__classes_per_batch=2)
        assert_one_error(outcome, 2, f"test classes of {made.folder}: {says}")
    assert not (base.root / "runs" / "new").exists() or not contents(base.root / "runs" / "new")


def test_a_validation_fold_of_one_class_chooses_nothing(run: Train, tmp_path: Path, base: Base) -> None:
    entries = [
        Entry(path, name, "train") for path, name in write_images(tmp_path, {f"c{i}": 3 for i in range(4)}, seed=0)
    ]
    made = write_store("x", entries, Folder(tmp_path / "store"), run_serially, num_folds=4)
    outcome = run(name="new", data__source=made.folder.uri, method__classes_per_batch=2, evaluation__clustering=False)
    assert_one_error(outcome, 2, f"validation classes of {made.folder}: all images are of one class")
