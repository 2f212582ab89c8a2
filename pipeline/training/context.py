"""What a method sees of the run (`methods.base.Context`), made of trunk, ranks, optimizers, clock and loader."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from methods import Batch, Method
from methods.base import Gradient
from methods.config import Clock, Length
from methods.optim import Optimizer
from methods.plans import Plan
from pipeline.data.store import Samples
from pipeline.distributed.collectives import Ranks, gather
from pipeline.distributed.seeding import seeded_generator
from pipeline.errors import RunError
from pipeline.evaluation.embedder import Embedder, trunk_features
from pipeline.mining.method_view import MethodMining
from pipeline.model.forward_mode import Outputs, derivative
from pipeline.model.trunk import Trunk

# Pixels of images that are differentiated at once while the step's own graph waits: 40 images of 128 pixels, 13 of 224.
_DERIVED_PIXELS = 2_000_000


class _RoleSlots(NamedTuple):
    """This rank's images of some slots.

    Attributes:
        pixels: of them.
        start: their place among these slots of all ranks.
        total: these slots of all ranks.
    """

    pixels: Tensor
    start: int
    total: int


class RunContext:
    """The context of one worker; see `methods.base.Context` for what a method may use.

    Args:
        samples: the training set.
        seed, length: of the run.
        precision: float64, float32 or bf16.
        device: of trunk and method.
        ranks: this worker's place.
        trunk: the bare trunk; wrapped in DDP here if there are several ranks.
        method: the method, on the device.
        embedder: for sweeps.
        load_best: puts the best weights into trunk and method.
        mining: the mining server, if the method mines.
    """

    def __init__(
        self,
        samples: Samples,
        seed: int,
        length: Length,
        precision: str,
        device: torch.device,
        ranks: Ranks,
        trunk: Trunk,
        method: Method,
        embedder: Embedder,
        load_best: Callable[[], None],
        mining: MethodMining | None = None,
    ) -> None:
        self.samples, self.labels, self.tracks = samples, samples.labels, samples.tracks
        self.seed, self.length, self.precision = seed, length, precision
        self.device, self.ranks = device, ranks
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.trunk, self.method, self.embedder, self.load_best = trunk, method, embedder, load_best
        self.optimizers: Mapping[str, Optimizer] = method.optimizers(trunk)
        self.ddp: nn.Module = trunk
        if ranks.world > 1:
            # find_unused_parameters: buckets are then never rebuilt after the first step, which would make a resumed run
            # differ in the last digits, and parameters may be frozen and thawed after wrapping.
            # broadcast_buffers: only `local` statistics differ between ranks.
            self.ddp = nn.parallel.DistributedDataParallel(
                trunk, find_unused_parameters=True, broadcast_buffers=trunk.config.batch_norm == "local"
            )
        self.clock = Clock()
        self.generator = seeded_generator(device, seed)
        self.shards: Sequence[slice] = ()
        self.next_ids: Int64[np.ndarray, " slots"] | None = None
        self.mining: MethodMining | None = mining
        self._plan_row: tuple[Plan, int] | None = None
        self._pixels: Tensor | None = None
        self._awaits_backward = False
        self._encoded = 0  # calls of encode in this step
        self._outputs: Outputs | None = None  # of what was encoded last, for its derivative
        self._kept_role: str | Sequence[str] | None = None
        self._features = torch.empty(0)

    def begin_epoch(self, clock: Clock, epoch: int) -> None:
        self.clock = clock
        self.generator = seeded_generator(self.device, self.seed, epoch, 1)
        if self.mining is not None:
            self.mining.step = clock.step

    def begin_step(self, clock: Clock, plan: Plan, row: int, pixels: Tensor) -> Batch:
        """Sets up one step and returns its batch; `pixels` are those of this rank's slots."""
        self.clock = clock
        self.generator = seeded_generator(self.device, self.seed, clock.step, 2)
        self._encoded, self._outputs = 0, None
        self._seed_global()  # dropout inside a backbone: the same after a resume
        self.next_ids = plan.ids[row + 1] if row + 1 < len(plan) else None
        if self.mining is not None:
            self.mining.step = clock.step
        self.shards = [self.ranks.slice(plan.ids.shape[1], rank) for rank in range(self.ranks.world)]
        self._plan_row, self._pixels, self._awaits_backward = (
            (plan, row),
            pixels.to(self.device, non_blocking=True),
            False,
        )
        self.trunk.set_mode(True, self.ranks)
        self.method.train()
        ids = torch.from_numpy(plan.ids[row]).to(self.device)
        labels = torch.from_numpy(self.labels[plan.ids[row]]).to(self.device)
        return Batch(ids, labels, {name: column[row] for name, column in plan.columns.items()})

    def encode(
        self, role: str | Sequence[str] | None = None, keep_for_jvp: bool = False
    ) -> Float[Tensor, "batch features"]:
        if self._awaits_backward:
            raise RuntimeError("a second encode before backward: ask for all roles in one call")
        part = self._role_slots(role)
        # under autocast they are not those of the derivative, which is of higher precision
        self._outputs = Outputs() if keep_for_jvp and self.precision != "bf16" else None
        self._kept_role = role
        with self._outputs or nullcontext():
            local = trunk_features(self.ddp, part.pixels, self.precision)
        self._features = local.detach()
        self._awaits_backward = torch.is_grad_enabled() and local.requires_grad
        self._encoded += 1  # dropout in the method: the same on every rank, however much the trunk has drawn here
        self._seed_global()
        return gather(local, part.start, part.total, self.ranks)

    def gradient(
        self,
        role: str | Sequence[str] | None,
        objective: Callable[[Tensor], Tensor],
        extra: Sequence[Tensor] = (),
        shift: Mapping[str, Tensor] | None = None,
    ) -> Gradient:
        part = self._role_slots(role)
        learnt = {n: p for n, p in self.trunk.named_parameters() if p.requires_grad}
        at = learnt if shift is None else {n: (p + shift[n]).detach().requires_grad_() for n, p in learnt.items()}
        with torch.enable_grad():
            local = trunk_features(self._trunk_with(at), part.pixels, self.precision)
            loss = objective(gather(local, part.start, part.total, self.ranks))
        self._check_finite(loss)
        found = torch.autograd.grad(loss, [*at.values(), *extra], allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip([*at.values(), *extra], found, strict=True)]
        # Every rank holds the same loss, so that the backward pass of `gather` has counted each of them.
        shared = [self.ranks.sum(g) / self.ranks.world for g in grads[: len(at)]]
        return Gradient(float(loss.detach()), dict(zip(at, shared, strict=True)), grads[len(at) :])

    def jvp(
        self, role: str | Sequence[str] | None, direction: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch features"]]:
        part = self._role_slots(role)
        wanted = {n: direction[n] for n, p in self.trunk.named_parameters() if n in direction}
        images = max(1, _DERIVED_PIXELS // part.pixels[0].numel() if len(part.pixels) else 1)
        outputs, self._outputs = (self._outputs if role == self._kept_role else None), None
        parts = []
        for start in range(0, max(1, len(part.pixels)), images):
            some = slice(start, start + images)
            known = outputs.of(some) if outputs else None
            # without autocast, which has no forward mode
            run = functools.partial(trunk_features, pixels=part.pixels[some], precision="float32")
            parts.append(derivative(self.trunk, run, wanted, known))
            if known and not torch.allclose(parts[-1][0], self._features[some], rtol=1e-3, atol=1e-4):
                raise RunError(
                    f"the backbone {self.trunk.config.backbone} gives other features in forward mode than it has just given: it is "
                    "random, or writes over an output that it uses twice. Choose another one for this method"
                )
        local, tangent = (gather(torch.cat(t), part.start, part.total, self.ranks) for t in zip(*parts, strict=True))
        return local, tangent

    def _trunk_with(self, parameters: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """The trunk without DDP around it, with other parameters."""
        return lambda pixels: torch.func.functional_call(self.trunk, dict(parameters), (pixels,))

    def _role_slots(self, role: str | Sequence[str] | None) -> _RoleSlots:
        """What this rank encodes of the slots of a role."""
        if self._plan_row is None or self._pixels is None:
            raise RuntimeError("encode is for training_step: there is no batch outside a step (use embed_samples)")
        plan, row = self._plan_row
        slots = np.arange(plan.ids.shape[1])
        if role is not None:
            if "role" not in plan.columns:
                raise RuntimeError(f"encode({role!r}), but the plan has no column 'role'")
            slots = np.flatnonzero(np.isin(plan.columns["role"][row], [role] if isinstance(role, str) else list(role)))
        mine = self.shards[self.ranks.rank]
        own = slots[(slots >= mine.start) & (slots < mine.stop)]
        pixels = self._pixels if role is None else self._pixels[torch.from_numpy(own - mine.start).to(self.device)]
        return _RoleSlots(pixels, int((slots < mine.start).sum()), len(slots))

    def _seed_global(self) -> None:
        """Seeds torch's global generators from (seed, step, calls of encode); 100 times faster than torch.manual_seed."""
        seed = seeded_generator(self.device, self.seed, self.clock.step, 3, self._encoded).initial_seed()
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def backward(self, loss: Float[Tensor, ""], retain_graph: bool = False) -> None:
        self._check_finite(loss)
        loss.backward(retain_graph=retain_graph)
        self._awaits_backward = False

    def _check_finite(self, loss: Tensor) -> None:
        if self.ranks.any(not bool(torch.isfinite(loss.detach()).all()), self.device):
            raise RunError(
                f"the loss is not finite at step {self.clock.step} (got {float(loss.detach())} on rank {self.ranks.rank}); "
                f"nothing was learnt from it, and the last checkpoint stands. Lower the learning rate, or look at its images: {self._sample_ids_of_step()}"
            )

    def _sample_ids_of_step(self) -> str:
        if self._plan_row is None:
            return "none"
        plan, row = self._plan_row
        return "sample ids " + ", ".join(str(int(i)) for i in self.samples.ids[plan.ids[row]][:8]) + " ..."

    def step(self, optimizer: str) -> None:
        chosen = self.optimizers[optimizer]
        chosen.step(self.clock, self.length)
        chosen.inner.zero_grad(set_to_none=True)

    def embed_samples(self, ids: Int64[np.ndarray, " some"], embed: bool = True) -> Float[Tensor, "some dim"]:
        out = self.embedder(self.samples.ids[ids], self.trunk, self.method if embed else None)
        self.trunk.set_mode(True, self.ranks)
        self.method.train()
        return out

    def weights_hash(self) -> str:
        found = hashlib.sha256()
        for module in (self.trunk, self.method):
            for name, value in module.state_dict().items():
                found.update(name.encode())
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()[:16]


def learning_rates(optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
    """Current rate of each optimizer's first group."""
    return {f"lr/{name}": o.inner.param_groups[0]["lr"] for name, o in optimizers.items()}
