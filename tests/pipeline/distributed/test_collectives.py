"""What ranks say to each other, against one process that holds the whole batch, in float64."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from pipeline.distributed.collectives import Ranks, gather
from pipeline.model.batch_norm import SyncBatchNorm2d
from tests.pool import Pool, RankFailed

pytestmark = pytest.mark.cluster
SHARES = [(6, 6), (7, 5), (12, 0), (4, 4, 4), (5, 4, 3), (6, 6, 0), (0, 12, 0)]


def own(shares: tuple[int, ...], rank: int) -> slice:
    return slice(sum(shares[:rank]), sum(shares[: rank + 1]))


# ---- gather ---------------------------------------------------------------------------------------------------------


def rows_and_weights() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(12, 5, generator=generator, dtype=torch.float64) for _ in range(3))  # type: ignore[return-value]


def some_loss(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return ((rows @ rows.T).tanh() * (weights @ weights.T)).sum()


def gather_on_ranks(rank: int, world: int, shares: tuple[int, ...]) -> dict[str, Any]:
    rows, tangents, weights = rows_and_weights()
    mine, ranks = own(shares, rank), Ranks(rank, world)
    local = rows[mine].clone().requires_grad_()
    whole = gather(local, mine.start, 12, ranks)
    some_loss(whole, weights).backward()

    def encode(x: torch.Tensor) -> torch.Tensor:
        return gather(x.sin(), mine.start, 12, ranks)

    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(rows[mine], tangents[mine])
        by_dual = forward_ad.unpack_dual(encode(dual)).tangent
    by_func = torch.func.jvp(encode, (rows[mine],), (tangents[mine],))[1]
    return {"whole": whole.detach(), "gradient": local.grad, "by_dual": by_dual, "by_func": by_func}


@pytest.mark.parametrize("shares", SHARES)
def test_gather_equals_one_process(pool: Pool, shares: tuple[int, ...]) -> None:
    rows, tangents, weights = rows_and_weights()
    whole = rows.clone().requires_grad_()
    some_loss(whole, weights).backward()
    world = len(shares)
    answers = pool(gather_on_ranks, world, shares)
    for rank, answer in enumerate(answers):
        assert torch.equal(answer["whole"], rows)
        # the sum over ranks of equal losses: DDP's mean over ranks turns it into the gradient of one process
        torch.testing.assert_close(answer["gradient"], world * whole.grad[own(shares, rank)], rtol=1e-12, atol=1e-12)
        for way in ("by_dual", "by_func"):
            torch.testing.assert_close(answer[way], rows.cos() * tangents, rtol=1e-14, atol=1e-14)


def test_gather_of_one_rank_is_the_rows_themselves() -> None:
    rows = torch.randn(3, 2)
    assert gather(rows, 0, 3, Ranks()) is rows


# ---- batch normalisation --------------------------------------------------------------------------------------------


def images_and_weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = 3 + torch.randn(12, 4, 3, 2, generator=generator, dtype=torch.float64)
    return images, torch.randn(12, 4, 3, 2, generator=generator, dtype=torch.float64)


def normalise(layer: nn.BatchNorm2d, shares: tuple[int, ...], rank: int) -> dict[str, Any]:
    """Two training steps' outputs and gradients, the running statistics, and an evaluation output, of one rank's images."""
    images, weights = images_and_weights()
    mine = own(shares, rank)
    layer.double().train()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 4))
        layer.bias.copy_(torch.linspace(-1, 1, 4))
    out = {}
    for step in range(2):
        local = (images[mine] * (step + 1)).requires_grad_()
        y = layer(local)
        (y.square() * weights[mine]).sum().backward()
        out |= {f"y{step}": y.detach(), f"x.grad{step}": local.grad}
    layer.eval()
    out["eval"] = layer(images[mine]).detach()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    return out | {"state": state, "weight.grad": layer.weight.grad, "bias.grad": layer.bias.grad}


def normalise_on_ranks(rank: int, world: int, shares: tuple[int, ...], momentum: float | None) -> dict[str, Any]:
    layer = SyncBatchNorm2d(4, momentum=momentum)
    layer.ranks = Ranks(rank, world)
    return normalise(layer, shares, rank)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shares", [(12,), *SHARES])
def test_batch_norm_equals_that_of_the_whole_batch(pool: Pool, shares: tuple[int, ...], momentum: float | None) -> None:
    expected = normalise(nn.BatchNorm2d(4, momentum=momentum), (12,), 0)
    answers = pool(normalise_on_ranks, len(shares), shares, momentum)
    close = {"rtol": 1e-12, "atol": 1e-12}
    for name in ("y0", "y1", "x.grad0", "x.grad1", "eval"):
        torch.testing.assert_close(torch.cat([a[name] for a in answers]), expected[name], **close)
    for name in ("weight.grad", "bias.grad"):
        torch.testing.assert_close(sum(a[name] for a in answers), expected[name], **close)
    for answer in answers:
        assert answer["state"].keys() == expected["state"].keys()
        for name, value in expected["state"].items():
            torch.testing.assert_close(answer["state"][name], value, **close)
    assert expected["x.grad0"].abs().min() > 1e-6 and expected["state"]["num_batches_tracked"] == 2


def test_batch_norm_of_far_values_keeps_its_digits() -> None:
    """The variance of 1000 ± 0.01 in float32: E[x²] − E[x]² would lose it."""
    x = 1000 + 0.01 * torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    layer = SyncBatchNorm2d(1, affine=False)
    expected = nn.functional.batch_norm(x.double(), None, None, training=True)
    assert (layer(x).double() - expected).abs().max() < 2e-2  # half an ulp of the mean, 3e-5, over a deviation of 0.01


def test_batch_norm_keeps_the_dtype_and_takes_no_images() -> None:
    layer = SyncBatchNorm2d(3)
    x = torch.randn(4, 3, 2, 2)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x[:0]).shape == (0, 3, 2, 2) and torch.isfinite(layer.running_mean).all()


# ---- agreement ------------------------------------------------------------------------------------------------------


def agree(rank: int, world: int) -> dict[str, Any]:
    ranks = Ranks(rank, world)
    value = {"rank": rank, "array": np.arange(rank)}
    return {
        "any": [ranks.any(False), *(ranks.any(rank == one) for one in range(world))],
        "broadcast": ranks.broadcast(value)["rank"],
        "none": ranks.broadcast(None if rank == 0 else rank),
        "collect": [(v["rank"], len(v["array"])) for v in ranks.collect(value)],
    }


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_agree(pool: Pool, world: int) -> None:
    for answer in pool(agree, world):
        assert answer == {
            "any": [False] + [True] * world,
            "broadcast": 0,
            "none": None,
            "collect": [(rank, rank) for rank in range(world)],
        }


def barrier(rank: int, world: int) -> tuple[float, float]:
    time.sleep(0.3 * rank)
    before = time.time()
    Ranks(rank, world).barrier()
    return before, time.time()


def test_a_barrier_waits_for_the_last(pool: Pool) -> None:
    times = pool(barrier, 3)
    assert min(after for _, after in times) >= max(before for before, _ in times)


@pytest.mark.parametrize("total", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_cover_all_slots_once(world: int, total: int) -> None:
    shares = [Ranks(rank, world).slice(total) for rank in range(world)]
    assert [i for share in shares for i in range(total)[share]] == list(range(total))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert shares == [Ranks(0, world).slice(total, rank) for rank in range(world)]


# ---- the pool itself: a broken rank must not hang the suite ---------------------------------------------------------


def misbehave(rank: int, world: int, how: str) -> int:
    if rank == 1 and how == "raise":
        raise ValueError("on purpose")
    if rank == 1 and how == "die":
        os._exit(7)
    if rank == 1 and how == "hang":
        time.sleep(600)
    Ranks(rank, world).barrier()
    return os.getpid()


@pytest.mark.parametrize(
    ("how", "message"), [("raise", "ValueError: on purpose"), ("die", "exit code 7"), ("hang", "hung")]
)
def test_a_broken_rank_is_reported_and_replaced(pool: Pool, how: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed, match=message):
        pool(misbehave, 2, how, timeout_s=3)
    assert time.monotonic() - started < 15
    assert len(set(pool(misbehave, 2, "behave"))) == 2
