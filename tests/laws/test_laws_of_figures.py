"""Figures, hooks, half precision and pixels do not depend on the number of ranks either."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from pipeline.config import Config
from pipeline.data.loader import LoadRequest, fetch
from pipeline.data.store import Samples, Store
from pipeline.distributed.collectives import Ranks
from pipeline.evaluation.evaluate_task import evaluate
from pipeline.evaluation.tasks import RetrievalTask
from pipeline.storage import Folder
from pipeline.testing.watched_run import FixedRanks, Seen, make_worker, state
from pipeline.training.parts import image_source
from tests.laws.test_laws import METHOD_CASES, SHARES, ZERO_GRADIENT, case, check
from tests.pool import Pool

pytestmark = pytest.mark.cluster


# ---- figures: exactly equal for equal embeddings --------------------------------------------------------------------


@dataclass
class FixedEmbedder:
    """Stands for an `Embedder`: the same embeddings on any number of ranks, with ties and near ties."""

    ranks: Ranks

    def __call__(self, ids: np.ndarray, trunk: None, method: None) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(20, 6, generator=generator)[torch.randint(20, (101,), generator=generator)]
        table += 1e-4 * torch.randn(101, 6, generator=generator) * (torch.rand(101, 1, generator=generator) > 0.5)
        return table[torch.from_numpy(ids)]


def measure(rank: int, world: int, shares: tuple[int, ...], with_gallery: bool) -> dict[str, Any]:
    ids = np.arange(101)
    samples = Samples(ids, np.random.default_rng(0).integers(0, 25, 101), ())
    sides = [Samples(ids[i::2], samples.labels[i::2], ()) for i in (0, 1)]
    task = RetrievalTask(*sides) if with_gallery else RetrievalTask(samples)
    result = evaluate(task, FixedEmbedder(FixedRanks(rank, world, shares)), None, None, (1, 2, 4), cluster=True)  # type: ignore[arg-type]
    return {"metrics": result.metrics, **{n: v.tolist() for n, v in vars(result.retrieval).items()}}


@pytest.mark.parametrize("with_gallery", [False, True])
def test_figures_are_exactly_those_of_one_process(pool: Pool, with_gallery: bool) -> None:
    expected = pool(measure, 1, (1,), with_gallery)[0]
    assert 0 < expected["metrics"]["recall@1"] < 100 and 0 < expected["metrics"]["nmi"] < 100
    for shares in SHARES:
        assert pool(measure, len(shares), shares, with_gallery) == [expected] * len(shares)


def test_hooks_and_load_best(make_config: Callable[..., Config]) -> None:
    """What the other tests compare with itself is also what the contract says."""
    changes = {
        "method.name": "swept_plan",
        "method.load_best_at": 9,
        "length": "2 epochs",
        "evaluation.every": "2 steps",
    }
    worker = make_worker(make_config({**changes, "evaluation.checkpoint": "last"}), 0, (12,))
    worker()
    assert worker.method.epochs_done == 2
    best = worker.progress.best_step
    assert best < worker.progress.step == 8
    optimizer = worker.context.optimizers["main"].inner
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    worker.context.load_best()
    for part in ("trunk", "method"):
        saved = load_safetensors(worker.run.read(f"best/step-{best:08d}/{part}.safetensors"))
        assert all(torch.equal(saved[n], v) for n, v in getattr(worker, part).state_dict().items())
    assert all(torch.equal(m, s["exp_avg"]) for m, s in zip(moments, optimizer.state.values(), strict=True))


@pytest.mark.parametrize("method", [m for m in METHOD_CASES if m not in ("random_miner", "swept_plan")])
def test_half_precision_ends_at_the_trunk(make_config: Callable[..., Config], method: str) -> None:
    """Features, and so distances, softmax and statistics of a method, are float32 whatever the trunk computes in."""
    changes = case(method, "sgd", "frozen") | {"precision": "bf16", "length": "2 steps", "method.optimizer.lr": 0.01}
    worker = make_worker(make_config(changes), 0, (12,))
    encode, seen = worker.context.encode, []

    def watched(*arguments: Any, **named: Any) -> Tensor:
        seen.append(encode(*arguments, **named))
        return seen[-1]

    worker.context.encode = watched  # type: ignore[method-assign]
    inside: set[torch.dtype] = set()
    worker.trunk.backbone.conv_stem.register_forward_hook(lambda m, i, out: inside.add(out.dtype))  # type: ignore[union-attr]
    worker()
    assert torch.bfloat16 in inside and {x.dtype for x in seen} == {torch.float32}
    assert all(v.dtype in (torch.float32, torch.int64, torch.float64) for v in worker.method.state_dict().values())
    assert all(torch.isfinite(v).all() for v in worker.method.state_dict().values())


# ---- law 2: what a slot shows follows from (seed, epoch, step, global slot) ------------------------------------------


def load_pixels(rank: int, world: int, values: dict[str, Any], shares: tuple[int, ...], start: int) -> list[Tensor]:
    """Pixels of this rank's slots from step `start` to step 8, over the border of an epoch."""
    worker = make_worker(Config.model_validate(values), rank, shares)
    steps = len(worker.method.plan(0, worker.context))
    worker.progress.step, worker.progress.epoch, worker.progress.step_in_epoch = start, start // steps, start % steps
    stream = worker.batches.pixels(worker.batches.plans_ahead(worker.progress), worker.progress)
    return [next(stream) for _ in range(start, 8)]


@pytest.fixture
def augmented(make_config: Callable[..., Config]) -> dict[str, Any]:
    everything = {"pad": 0.1, "rotate": 30, "flip": 0.5, "jitter": 0.3, "hue": 0.1, "grey": 0.2}
    return make_config({f"data.transforms.{key}": value for key, value in everything.items()}).model_dump(mode="json")


def test_augmentation_does_not_know_the_ranks(pool: Pool, augmented: dict[str, Any]) -> None:
    expected = pool(load_pixels, 1, augmented, (12,), 0)[0]
    assert expected[0].shape == (12, 3, 24, 24)
    for shares in SHARES:
        parts = pool(load_pixels, len(shares), augmented, shares, 0)
        assert all(
            torch.equal(torch.cat(step), whole) for step, whole in zip(zip(*parts, strict=True), expected, strict=True)
        )


def test_augmentation_does_not_know_where_the_run_was_resumed(pool: Pool, augmented: dict[str, Any]) -> None:
    expected = pool(load_pixels, 1, augmented, (12,), 0)[0]
    for start in (3, 7):
        resumed = pool(load_pixels, 1, augmented, (12,), start)[0]
        assert all(torch.equal(a, b) for a, b in zip(resumed, expected[start:], strict=True))


def test_one_image_twice_is_augmented_twice(make_config: Callable[..., Config], augmented: dict[str, Any]) -> None:
    config = Config.model_validate(augmented)
    source = image_source(config, Store(Folder(config.data.source)))

    def pixels(ids: list[int], key: tuple[int, int, int] | None) -> np.ndarray:
        return fetch(source, LoadRequest(np.array(ids), key))

    twice = pixels([5, 5, 8], (0, 3, 6))
    assert not np.array_equal(twice[0], twice[1])
    assert np.array_equal(twice[1:], pixels([5, 8], (0, 3, 7)))  # the slot counts, not the place in the item
    for other in ((1, 3, 6), (0, 4, 6), (0, 3, 7)):
        assert not np.array_equal(twice[0], pixels([5], other)[0])
    other_seed = dataclasses.replace(source, seed=source.seed + 1)
    assert not np.array_equal(twice[0], fetch(other_seed, LoadRequest(np.array([5]), (0, 3, 6)))[0])
    still = pixels([5, 5], None)
    assert np.array_equal(still[0], still[1])


def test_nothing_is_drawn_from_a_global_generator(make_config: Callable[..., Config]) -> None:
    """The same run under other global seeds, and it leaves numpy's global state alone."""
    config = make_config(
        {"length": "3 steps", "method.loss": "TripletMarginLoss", "method.miner": "DistanceWeightedMiner"}
    )
    trained = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        state_before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
        worker = make_worker(config.model_copy(update={"name": f"seed{seed}"}), 0, (12,))
        worker()
        assert np.array_equal(state_before, np.random.get_state()[1])  # type: ignore[index]
        trained.append(state(worker))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def train_with_dropout(rank: int, world: int, values: dict[str, Any], shares: tuple[int, ...], in_trunk: bool) -> Seen:
    """Dropout from torch's global generator in the method, and in the trunk, where it cannot be the same on any shares."""
    worker = make_worker(Config.model_validate(values), rank, shares)
    embed, drop = worker.method.embed, torch.nn.Dropout(0.3)
    worker.method.embed = lambda features: embed(drop(features) if worker.method.training else features)  # type: ignore[method-assign]
    if in_trunk:
        worker.trunk.pool = torch.nn.Sequential(worker.trunk.pool, torch.nn.Dropout(0.3))  # type: ignore[assignment]
    worker()
    return Seen([], {}, state(worker), [])


@pytest.mark.parametrize("in_trunk", [False, True])
def test_dropout_is_the_same_on_all_ranks(pool: Pool, make_config: Callable[..., Config], in_trunk: bool) -> None:
    changes = {"length": "3 steps", "evaluation.checkpoint": "last"}
    values = [make_config(changes, name).model_dump(mode="json") for name in ("one", "two")]
    got = pool(train_with_dropout, 2, values[0], (7, 5), in_trunk)
    if in_trunk:  # the ranks agree with each other, if not with one process
        assert all(torch.equal(got[1].after[n], v) for n, v in got[0].after.items())
    else:
        check(got, pool(train_with_dropout, 1, values[1], (12,), in_trunk)[0], ZERO_GRADIENT["sync"])
