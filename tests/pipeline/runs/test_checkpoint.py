"""Checkpoints: everything comes back exactly, nothing half-written counts, nothing is run that was read."""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import os
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from methods.config import Clock, Length
from methods.optim import Optimizer, OptimizerConfig, build_optimizer
from methods.plans import Plan
from pipeline.errors import RunError, UserError
from pipeline.runs.checkpoint import Checkpoints, TrainingState
from pipeline.storage import Folder


class Run:
    """A trunk, a method and two optimizers of different kinds, trained by random gradients."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
        self.method = nn.Sequential(nn.Linear(4, 3).double())
        self.method.register_buffer("running", torch.tensor(0.1 * seed, dtype=torch.float64))
        self.method.register_buffer("count", torch.tensor(seed))
        main = OptimizerConfig(name="adamw", lr=0.1, weight_decay=0.1)
        second = OptimizerConfig(name="sgd", lr=0.1, momentum=0.9)
        self.optimizers: dict[str, Optimizer] = {
            "main": build_optimizer(main, {"trunk": self.trunk.parameters(), "head": self.method.parameters()}),
            "second": build_optimizer(second, {"head": self.method.parameters()}),
        }

    def step(self, seed: int) -> Run:
        random = torch.Generator().manual_seed(seed)
        for p in [*self.trunk.parameters(), *self.method.parameters()]:
            p.grad = torch.randn(p.shape, generator=random, dtype=p.dtype)
        for optimizer in self.optimizers.values():
            optimizer.step(Clock(seed, 0.0), Length(value=10, unit="steps"))
        self.trunk[1].running_mean.normal_(generator=random)
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {f"{n}.{k}": v for n in ("trunk", "method") for k, v in getattr(self, n).state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.inner.state_dict()["state"].items():
                found |= {f"{name}.{index}.{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}
        return {k: v.clone() for k, v in found.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


PLAN = Plan(
    np.arange(6).reshape(2, 3),
    {
        "role": np.array([["a", "p", "n"]] * 2),
        "weight": np.array([[0.1, 0.2, 1 / 3]] * 2),
        "kind": np.zeros((2, 3), dtype=np.int32),
    },
)


def owner(folder: Folder, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    checkpoints.acquire()
    return checkpoints


def save(
    checkpoints: Checkpoints,
    run: Run,
    step: int,
    kind: str = "checkpoints",
    plan: Plan | None = None,
    **progress: object,
) -> TrainingState:
    saved = TrainingState(step=step, **progress)
    checkpoints.save(kind, saved, run.trunk, run.method, run.optimizers, plan)
    return saved


@pytest.fixture
def local(tmp_path) -> Folder:
    return Folder(tmp_path)


# ---- round trip ------------------------------------------------------------------------------------------------------


def test_everything_comes_back_exactly(folder: Folder) -> None:
    run = Run().step(1).step(2)
    before = run.tensors()
    metrics = {"map@r": 12.345678901234567, "recall@1": 1 / 3}
    saved = save(owner(folder), run, 7, plan=PLAN, epoch=2, step_in_epoch=3, seconds=0.1 + 0.2, waited_s=1e-9, images=10**9,
                 frozen=metrics, best_step=5, best_metrics=metrics)  # fmt: skip
    run.step(3)  # what was saved is a copy
    after = run.tensors()

    reader = Checkpoints(folder)
    assert reader.steps() == [7] and reader.latest() == saved == reader.progress("checkpoints", 7)
    other = Run(seed=9)
    plan = reader.load("checkpoints", 7, other.trunk, other.method, other.optimizers)
    assert_equal(other.tensors(), before)
    np.testing.assert_array_equal(plan.ids, PLAN.ids)
    assert plan.ids.dtype == np.int64 and plan.columns.keys() == PLAN.columns.keys()
    for name, column in PLAN.columns.items():
        np.testing.assert_array_equal(plan.columns[name], column)
        assert plan.columns[name].dtype == column.dtype
    assert_equal(other.step(3).tensors(), after)  # moments, step counts and rates too


def test_a_stored_plan_takes_what_its_ids_and_its_own_columns_take(local: Folder) -> None:
    """A column that all steps share, such as roles, is stored once: at ten million triplets it was a gigabyte of text."""
    steps, slots = 500, 96
    ids = np.random.default_rng(0).integers(0, 2**16, (steps, slots))
    ids[3, 4] = 2**16 - 1
    roles = np.broadcast_to(np.repeat(["anchor", "positive", "negative"], 32), ids.shape)
    plan = Plan(ids, {"role": roles, "kind": (ids % 3).astype(np.int8)})
    save(owner(local), Run(), 1, plan=plan)
    assert len(local.read("checkpoints/step-00000001/plan.npz")) < 3 * ids.size + 8 * 4 * slots + 2000
    run = Run()
    again = Checkpoints(local).load("checkpoints", 1, run.trunk, run.method, run.optimizers)
    assert again.ids.dtype == np.int64 and np.array_equal(again.ids, ids)
    for name, column in plan.columns.items():
        assert again.columns[name].dtype == column.dtype and np.array_equal(again.columns[name], column)
        assert np.array_equal(again.columns[name][7], column[7])


def test_weights_alone(local: Folder) -> None:
    """An evaluation, and the best weights at the end, leave the optimizers as they are."""
    save(owner(local), Run().step(1), 3, kind="best")
    other = Run(seed=9).step(4)
    moments = copy.deepcopy({n: o.inner.state_dict() for n, o in other.optimizers.items()})
    assert Checkpoints(local).load("best", 3, other.trunk, other.method) is None
    trunk = Run(seed=8)
    assert Checkpoints(local).load("best", 3, trunk.trunk, None) is None
    expected = Run().step(1)
    for name, value in expected.trunk.state_dict().items():
        assert torch.equal(value, other.trunk.state_dict()[name]) and torch.equal(value, trunk.trunk.state_dict()[name])
    assert torch.equal(trunk.method[0].weight, Run(seed=8).method[0].weight)
    for name, state in moments.items():
        for index, values in other.optimizers[name].inner.state_dict()["state"].items():
            assert all(
                torch.equal(v, state["state"][index][k]) for k, v in values.items() if isinstance(v, torch.Tensor)
            )


def test_nothing_saved_yet(folder: Folder) -> None:
    reader = Checkpoints(folder)
    assert reader.steps() == [] and reader.steps("best") == [] and reader.latest() is None


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_are_kept_and_the_best_is_pinned(keep: int, folder: Folder) -> None:
    checkpoints, run = owner(folder, keep), Run()
    save(checkpoints, run, 2, kind="best")
    for step in range(1, 5):
        save(checkpoints, run, step, best_step=2 if step >= 2 else -1)
        assert checkpoints.steps() == list(range(max(1, step - keep + 1), step + 1))
        assert checkpoints.steps("best") == [2], "however old it grows"
    save(checkpoints, run, 5, kind="best")
    assert checkpoints.steps("best") == [2, 5], (
        "the older one stays until a checkpoint that knows of the new one is whole"
    )
    for step in range(5, 5 + keep):
        assert 2 in checkpoints.steps("best")
        save(checkpoints, run, step, best_step=5)
    assert checkpoints.steps("best") == [5], "then nobody can go back to the older one"


def test_an_unfinished_checkpoint_does_not_count_and_is_cleared_away(folder: Folder) -> None:
    checkpoints, run = owner(folder, keep=1), Run()
    first = save(checkpoints, run, 1)
    for name in ("trunk.safetensors", "optimizers.pt"):  # killed before checkpoint.json
        folder.write(f"checkpoints/step-00000004/{name}", b"half")
    folder.write("checkpoints/step-00000002.bak/checkpoint.json", b"{}")  # somebody's own copy
    assert checkpoints.steps() == [1] and checkpoints.latest() == first
    save(checkpoints, run, 5)
    assert folder.names("checkpoints") == ["step-00000002.bak", "step-00000005"]


def test_the_same_step_again_is_never_a_mixture(local: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run saves a step that is there already; killed in between, that step is gone, not mixed."""
    checkpoints = owner(local)
    save(checkpoints, Run(0), 1)
    save(checkpoints, Run(1), 2)
    original = Folder.write

    def killed(self: Folder, name: str, data: bytes) -> None:
        if name.endswith("method.safetensors"):
            raise KeyboardInterrupt
        original(self, name, data)

    monkeypatch.setattr(Folder, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, Run(2), 2)
    monkeypatch.undo()
    assert Checkpoints(local).steps() == [1]
    save(checkpoints, Run(2), 2)
    other = Run(9)
    checkpoints.load("checkpoints", 2, other.trunk, other.method)
    assert torch.equal(other.method[0].weight, Run(2).method[0].weight)


def test_steps_are_sorted_as_numbers(local: Folder) -> None:
    checkpoints = owner(local, keep=5)
    for step in (99_999_999, 100_000_000, 9):
        save(checkpoints, Run(), step)
    assert checkpoints.steps() == [9, 99_999_999, 100_000_000]


# ---- ownership -------------------------------------------------------------------------------------------------------


def test_an_older_process_stops_before_it_writes(folder: Folder) -> None:
    old = owner(folder)
    save(old, Run(0), 1)
    new = owner(folder)
    assert (old.incarnation, new.incarnation) == (1, 2)
    for kind in ("checkpoints", "best"):
        with pytest.raises(
            RunError, match=r"another process \(attempt 2\) now owns the run .*: stopping this one \(attempt 1\)"
        ):
            save(old, Run(1), 2, kind=kind)
    save(new, Run(2), 2)
    assert new.steps() == [1, 2] and new.steps("best") == []
    with pytest.raises(RunError, match="now owns the run"):
        Checkpoints(folder).save(
            "checkpoints", TrainingState(step=3), *[Run().trunk, Run().method], {}
        )  # a reader owns nothing


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", ["trunk.safetensors", "optimizers.pt", "checkpoint.json"])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(
    fails_at: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, run = owner(folder), Run()
    write = Folder.write

    def full(self: Folder, name: str, data: bytes) -> None:
        if name.endswith(fails_at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "write", full)
        with pytest.raises(RunError, match="there is no earlier checkpoint"):
            save(checkpoints, run, 1)
    save(checkpoints, run, 2)
    expected = run.tensors()
    monkeypatch.setattr(Folder, "write", full)
    with pytest.raises(RunError, match="checkpoint of step 2 is kept: make room") as caught:
        save(checkpoints, run.step(1), 3)
    assert (
        "\n" not in str(caught.value) and "step-00000003" in str(caught.value) and "No space left" in str(caught.value)
    )
    assert checkpoints.steps() == [2] and folder.names("checkpoints") == ["step-00000002"], "what was begun is removed"
    again = Run(5)
    checkpoints.load("checkpoints", 2, again.trunk, again.method, again.optimizers)
    assert_equal(again.tensors(), expected)


# ---- damage ----------------------------------------------------------------------------------------------------------

FILES = ["trunk.safetensors", "method.safetensors", "optimizers.pt", "plan.npz"]


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_with_the_way_out(file: str, damage: str, tmp_path) -> None:
    folder = Folder(tmp_path)
    checkpoints = owner(folder)
    save(checkpoints, Run(), 1)
    save(checkpoints, Run().step(1), 2, plan=PLAN)
    name = f"checkpoints/step-00000002/{file}"
    data = bytearray(folder.read(name))
    data[len(data) // 2] ^= 4
    folder.remove(name)
    if damage != "missing":
        folder.write(name, bytes(data) if damage == "flipped bit" else bytes(data[:-9]))
    other = Run()
    what = "missing" if damage == "missing" else "damaged"
    with pytest.raises(
        UserError, match=rf"{name} is {what}.*: remove checkpoints/step-00000002 to resume from the previous checkpoint"
    ):
        checkpoints.load("checkpoints", 2, other.trunk, other.method, other.optimizers)
    folder.remove("checkpoints/step-00000002")  # what the message says
    assert checkpoints.latest().step == 1
    checkpoints.load("checkpoints", 1, other.trunk, other.method, other.optimizers)


def test_a_damaged_record_is_named(tmp_path) -> None:
    checkpoints = owner(Folder(tmp_path))
    save(checkpoints, Run(), 1)
    Folder(tmp_path).write("checkpoints/step-00000001/checkpoint.json", b'{"progress": {"st')
    with pytest.raises(UserError, match=r"step-00000001/checkpoint\.json is not valid JSON"):
        checkpoints.latest()


def test_tensors_that_do_not_fit_are_told_in_one_line(tmp_path) -> None:
    checkpoints = owner(Folder(tmp_path))
    save(checkpoints, Run(), 1)
    with pytest.raises(UserError, match=r"step-00000001 does not fit the configured model: .*size mismatch") as caught:
        checkpoints.load("checkpoints", 1, nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), None)
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def replace(folder: Folder, file: str, data: bytes) -> None:
    """Puts other bytes into a checkpoint, with a checksum that matches."""
    folder.write(f"checkpoints/step-00000001/{file}", data)
    record = folder.read_json("checkpoints/step-00000001/checkpoint.json")
    record["sha256"][file] = hashlib.sha256(data).hexdigest()
    folder.write_json("checkpoints/step-00000001/checkpoint.json", record)


@pytest.mark.parametrize("file", FILES)
def test_nothing_that_is_read_is_run(file: str, tmp_path) -> None:
    """A pickle with a matching checksum, where someone who may write the run folder has put it."""
    folder, harm = Folder(tmp_path / "run"), str(tmp_path / "harm")
    checkpoints = owner(folder)
    save(checkpoints, Run(), 1, plan=PLAN)
    buffer = io.BytesIO()
    if file == "plan.npz":
        array = io.BytesIO()
        np.save(array, np.array([Malicious(harm)], dtype=object), allow_pickle=True)
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("ids.npy", array.getvalue())
    else:
        torch.save({"optimizers": {"main": Malicious(harm)}}, buffer)
    replace(folder, file, buffer.getvalue())
    other = Run()
    with pytest.raises(UserError, match=r"step-00000001") as caught:
        checkpoints.load("checkpoints", 1, other.trunk, other.method, other.optimizers)
    assert not os.path.exists(harm) and "\n" not in str(caught.value)


def test_progress_holds_json_only(tmp_path) -> None:
    """A field that JSON cannot hold would be noticed at the first save, not when resuming."""
    import json

    progress = TrainingState(step=3, frozen={"a": 0.1}, best_metrics={"b": 2.0})
    assert TrainingState(**json.loads(json.dumps(asdict(progress)))) == progress


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["trunk", "method"])
def test_parameters_that_are_not_finite_are_not_saved(name: str, value: float, tmp_path) -> None:
    checkpoints, run = owner(Folder(tmp_path)), Run()
    save(checkpoints, run, 1)
    before = sorted(p for p in tmp_path.rglob("*"))
    next(getattr(run, name).parameters()).data[0, 1] = value
    with pytest.raises(
        RunError,
        match=rf"1 of \d+ tensors are not finite at step 2 \(first: {'method.0' if name == 'method' else '0'}\.weight\)",
    ):
        save(checkpoints, run, 2)
    assert sorted(p for p in tmp_path.rglob("*")) == before
