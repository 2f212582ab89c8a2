"""Communication between ranks: gathered features with gradient, sums, logical or, broadcast.

One rule holds for all: everything after the pooled features is replicated, so every rank has the
same loss. The backward pass of `gather` sums over the ranks and keeps its own rows; with DDP's mean
over ranks the trunk then receives exactly the gradient of one process on the whole batch. No other
scale factor exists anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's rank among the workers, and collective operations with the others.

    Attributes:
        rank: From 0 to `world` - 1.
        world: Number of workers.
    """

    rank: int = 0
    world: int = 1

    def slice(self, total: int, rank: int | None = None) -> slice:
        """The contiguous share of `total` slots of a rank; shares differ by at most one, and may be empty."""
        rank = self.rank if rank is None else rank
        return slice(total * rank // self.world, total * (rank + 1) // self.world)

    def any(self, flag: bool, device: torch.device | str = "cpu") -> bool:
        """True on every rank if the flag is set on one."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag), device=device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    def largest(self, values: Tensor) -> Tensor:
        """Each element's largest value over the ranks, on the device of `values`."""
        if self.world == 1:
            return values
        out = values.clone()
        dist.all_reduce(out, dist.ReduceOp.MAX)
        return out

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, without gradient."""
        return value if self.world == 1 else SumOverRanks.forward(value.detach())

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (any small picklable object) on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value (any picklable object), in rank order, on every rank."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def copy_to_ranks(self, value: Tensor) -> Tensor:
        """A replicated value, unchanged; its gradient is summed over the ranks, each of which computes a part."""
        return value if self.world == 1 else _CopyToRanks.apply(value)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Sum over ranks of the parts of a replicated value; its gradient is passed on unchanged."""
        return value if self.world == 1 else _SumOfParts.apply(value)


class _Gather(torch.autograd.Function):
    """Rows of all ranks in rank order, by an all-reduce of the zero-padded local rows."""

    @staticmethod
    def forward(local: Tensor, start: int, total: int) -> Tensor:
        whole = local.new_zeros((total, *local.shape[1:]))
        whole[start : start + len(local)] = local
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        local, ctx.start, ctx.total = inputs
        ctx.count = len(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.count], None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return _Gather.forward(tangent, ctx.start, ctx.total)


def gather(
    local: Float[Tensor, "rows features"], start: int, total: int, ranks: Ranks
) -> Float[Tensor, "total features"]:
    """Rows of all ranks, with gradient (and forward-mode derivative).

    Args:
        local: This rank's rows; may be empty.
        start: Index of the first of them among the rows of all ranks.
        total: Number of rows of all ranks together.
        ranks: The ranks that take part; their rows cover 0..total without overlap.
    """
    return local if ranks.world == 1 else _Gather.apply(local, start, total)


class SumOverRanks(torch.autograd.Function):
    """Sum over ranks; its gradient is the sum over ranks as well."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        out = value.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return SumOverRanks.forward(grad.contiguous())


class _SumOfParts(SumOverRanks):
    """Sum over ranks whose result is used in the same way on every rank."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class _CopyToRanks(SumOverRanks):
    """The opposite of `_SumOfParts`: a replicated value that each rank uses for its part of the work."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.view_as(value)
