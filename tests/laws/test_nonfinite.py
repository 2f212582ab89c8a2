"""Law 1 where a step is left out: an image whose features are not finite, on whichever rank, is the same on 1, 2 and 3 ranks.

The trunk gets NaN in place of the pixels of some images, told by their pixels, so that it does not depend on ranks; batch norms
over all ranks then spread it to every image of the step, and into their running statistics.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.model.trunk import Trunk
from pipeline.testing.tiny import tiny_values
from pipeline.testing.watched_run import Seen, make_worker, state, watched
from tests.laws.test_laws import SMALL, case, check, zero_gradient
from tests.pool import Pool
from tests.stubs import registered

pytestmark = pytest.mark.cluster
BAD_ONE_IN = 23  # images, by the sum of their pixels


@contextlib.contextmanager
def bad_images() -> Iterator[None]:
    """While training, the trunk sees NaN in place of some images."""
    forward = Trunk.forward

    def with_nan(self: Trunk, pixels: Tensor) -> Tensor:
        if not self.training:
            return forward(self, pixels)
        bad = pixels.flatten(1).sum(1, dtype=torch.int64) % BAD_ONE_IN == 0

        def spoil(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            return (torch.where(bad[:, None, None, None], torch.nan, inputs[0]),)

        handle = self.backbone.register_forward_pre_hook(spoil)
        try:
            return forward(self, pixels)
        finally:
            handle.remove()

    Trunk.forward = with_nan  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trunk.forward = forward  # type: ignore[method-assign]


def train(rank: int, world: int, values: dict[str, Any], shares: tuple[int, ...]) -> Seen:
    with registered(), bad_images():
        return watched(Config.model_validate(values), rank, shares)


class Runs:
    def __init__(self, pool: Pool, store: Store, root: str) -> None:
        self.pool, self.store, self.root = pool, store, root

    def __call__(self, method: str, batch_norm: str, shares: tuple[int, ...]) -> list[Seen]:
        name = "-".join([method, batch_norm, *map(str, shares)])
        changes = {"name": name, "runtime.skip_nonfinite": 4, **case(method, "adamw", batch_norm)}
        return self.pool(train, len(shares), tiny_values(self.root, self.store.folder.uri, changes), shares)


@pytest.fixture(scope="module")
def runs(pool: Pool, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(pool, store, str(tmp_path_factory.mktemp("runs")))


def skipped(runs: Runs, name: str) -> int:
    return int(json.loads((Path(runs.root) / "runs" / name / "summary.json").read_text())["skipped_steps"])


@pytest.mark.parametrize(
    "method",
    ["multi_similarity", "mined", "two_optimizers", "osm_caa", "intra_batch", "mmsi", "smart_mining", "gca_hng"],
)
def test_a_step_with_an_image_of_nan_is_left_out_alike_on_any_number_of_ranks(runs: Runs, method: str) -> None:
    (alone,) = runs(method, "sync", (12,))
    assert 1 <= skipped(runs, f"{method}-sync-12") <= 4, "the case shows nothing"
    assert all(bool(v.isfinite().all()) for v in alone.after.values() if v.is_floating_point())
    check(runs(method, "sync", (7, 5)), alone, zero_gradient(method, "sync") | SMALL)
    assert skipped(runs, f"{method}-sync-7-5") == skipped(runs, f"{method}-sync-12")


def train_with_faults_on_one_rank(
    rank: int, world: int, values: dict[str, Any], shares: tuple[int, ...]
) -> tuple[int, int, dict[str, Tensor], dict[str, Tensor]]:
    """Step 1: the loss of rank 1 is not finite; step 2: its gradient; step 3: nothing. The state after steps 1, 3 and 4."""
    worker = make_worker(Config.model_validate(values), rank, shares)
    loss, encode, states = worker.method.loss, worker.context.encode, []

    def bad_loss(*arguments: Any) -> Tensor:
        states.append(state(worker))
        return loss(*arguments) * (float("nan") if rank == 1 and worker.context.clock.step == 1 else 1.0)

    def bad_gradient(*roles: Any, **options: Any) -> Tensor:
        features = encode(*roles, **options)
        bad = rank == 1 and worker.context.clock.step == 2
        return features + (features[:, :1] - features[:, :1]).sqrt() if bad else features

    worker.method.loss = bad_loss  # type: ignore[method-assign]
    worker.context.encode = bad_gradient  # type: ignore[method-assign]
    worker()
    return worker.progress.skipped_steps, worker.progress.images, states[1], states[3]


def test_a_fault_of_one_rank_leaves_the_step_out_on_all(pool: Pool, make_config: Callable[..., Config]) -> None:
    changes = {"model.batch_norm": "frozen", "runtime.skip_nonfinite": 2, "length": "5 steps"}
    values = make_config(changes).model_dump(mode="json")
    found = pool(train_with_faults_on_one_rank, 2, values, (6, 6))
    for skipped_steps, images, before, after in found:
        assert (skipped_steps, images) == (2, 3 * 12)
        assert all(torch.equal(after[name], value) for name, value in before.items()), "nothing has moved in between"
    assert all(torch.equal(found[0][3][name], value) for name, value in found[1][3].items())
