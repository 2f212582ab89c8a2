"""The context that a method's training step runs in (`methods.base.Context`): trunk, ranks, optimizers, clock, mining."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from methods import Batch, Method
from methods.base import Gradient, MethodError
from methods.config import Clock, Length
from methods.optim import Optimizer
from methods.plans import Plan
from pipeline.data.store import Samples
from pipeline.distributed.collectives import Ranks, gather
from pipeline.distributed.seeding import seeded_generator
from pipeline.errors import NonFiniteError, RunError
from pipeline.evaluation.embedder import Embedder
from pipeline.mining.method_view import MethodMining
from pipeline.model.forward_mode import Outputs
from pipeline.model.layers import TrainedParts
from pipeline.model.network import trunk_features
from pipeline.model.trunk import Trunk
from pipeline.training.derivatives import RoleSlots, trunk_gradient, trunk_jvp
from pipeline.training.nonfinite import StepUndo, name_samples
from pipeline.training.step_checks import StepChecks, overflows


class RunContext:
    """The context of one worker; `methods.base.Context` is its interface to methods.

    Args:
        samples: The training set.
        seed, length: Seed and length of the run.
        precision: float64, float32 or bf16.
        device: Device of trunk and method.
        ranks: This worker's rank and the collectives.
        trunk: The trunk; wrapped in DDP here if there are several ranks.
        method: The method, on the device.
        embedder: The embedder, for `embed_samples`.
        load_best: Loads the best weights into trunk and method.
        mining: The mining server, if the method mines.
        undoes: Whether a step can be left out (`undo_step`), which takes a copy of all buffers each step.
        images_per_pass: Largest number of images that the trunk is given at once; None: all of this rank's.
        trained_parts: Which parts of the trunk are trained when; None: all of it.
        asked_to_stop: Whether this rank has been asked to stop; told to the other ranks with each step's checks.
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
        undoes: bool = False,
        images_per_pass: int | None = None,
        trained_parts: TrainedParts | None = None,
        asked_to_stop: Callable[[], bool] = bool,
    ) -> None:
        self.samples = samples
        self.labels = samples.labels
        self.tracks = samples.tracks
        self.seed = seed
        self.length = length
        self.precision = precision
        self.device = device
        self.ranks = ranks
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.trunk = trunk
        self.method = method
        self.embedder = embedder
        self.load_best = load_best
        self.optimizers: Mapping[str, Optimizer] = method.optimizers(trunk)
        self.ddp: nn.Module = trunk
        if ranks.world > 1:
            # find_unused_parameters: buckets are then never rebuilt after the first step, which would make a resumed run
            # differ in the last digits, and parameters may be frozen and thawed after wrapping.
            # Buffers are only sent where they differ between ranks: `local` statistics.
            data_parallel: Any = nn.parallel.DistributedDataParallel
            renamed = (
                "forward_sync_buffers" in inspect.signature(data_parallel).parameters
            )  # of later versions of PyTorch
            option = {"forward_sync_buffers" if renamed else "broadcast_buffers": trunk.config.batch_norm == "local"}
            self.ddp = data_parallel(trunk, find_unused_parameters=True, **option)
        self.clock = Clock()
        self.measures_gradients = False  # whether `gradient_norms` of the present step are computed
        # "gradient/OPTIMIZER": norm of its last gradient in the step, before it is clipped
        self.gradient_norms: dict[str, Tensor] = {}
        self.generator = seeded_generator(device, seed)
        self.shards: Sequence[slice] = ()
        self.next_ids: Int64[np.ndarray, " slots"] | None = None
        self.mining: MethodMining | None = mining
        self.images_per_pass = images_per_pass
        self.trained_parts = trained_parts
        self._undo = StepUndo([trunk, method], self.optimizers) if undoes else None
        self._checks = StepChecks(ranks, device, asked_to_stop)
        self._gathered: tuple[np.ndarray, Tensor] | None = None  # slots and features of this step's last `encode`
        self._plan_row: tuple[Plan, int] | None = None
        self._pixels: Tensor | None = None
        self._awaits_backward = False
        self._num_encoded = 0  # calls of encode in this step
        self._outputs: Outputs | None = None  # kept by the last `encode` for its `jvp`, with its role and its features
        self._kept_role: str | Sequence[str] | None = None
        self._features = torch.empty(0)

    def begin_epoch(self, clock: Clock, epoch: int) -> None:
        self.clock = clock
        self.generator = seeded_generator(self.device, self.seed, epoch, 1)
        if self.mining is not None:
            self.mining.step = clock.step

    def begin_step(self, clock: Clock, plan: Plan, row: int, pixels: Tensor) -> Batch:
        """Sets up one step and returns its batch; `pixels` are the images of this rank's slots."""
        self.clock = clock
        self.generator = seeded_generator(self.device, self.seed, clock.step, 2)
        self._num_encoded = 0
        self.gradient_norms = {}
        self._outputs = None
        self._gathered = None
        self._checks.begin_step()
        if self._undo is not None:
            self._undo.begin_step()
        self._seed_global()  # dropout inside a backbone: the same after a resume
        self.next_ids = plan.ids[row + 1] if row + 1 < len(plan) else None
        if self.mining is not None:
            self.mining.step = clock.step
        self.shards = [self.ranks.slice(plan.ids.shape[1], rank) for rank in range(self.ranks.world)]
        self._plan_row = (plan, row)
        self._pixels = pixels.to(self.device, non_blocking=True)
        self._awaits_backward = False
        self.trunk.set_mode(True, self.ranks)
        if self.trained_parts is not None:
            self.trained_parts.set(clock)
        self.method.train()
        host_ids, host_labels = plan.ids[row], self.labels[plan.ids[row]]
        ids, labels = (torch.from_numpy(x).to(self.device, non_blocking=True) for x in (host_ids, host_labels))
        columns = {name: column[row] for name, column in plan.columns.items()}
        return Batch(ids, labels, columns, host_ids, host_labels)

    def encode(
        self, role: str | Sequence[str] | None = None, keep_for_jvp: bool = False
    ) -> Float[Tensor, "batch features"]:
        if self._awaits_backward:
            raise RuntimeError("a second encode before backward: ask for all roles in one call")
        role_slots = self._role_slots(role)
        # Outputs under autocast cannot be reused: the derivative is computed in higher precision. Of parts they are not kept.
        in_parts = self.images_per_pass is not None and len(role_slots.pixels) > self.images_per_pass
        self._outputs = Outputs() if keep_for_jvp and self.precision != "bf16" and not in_parts else None
        self._kept_role = role
        with self._outputs or nullcontext():
            is_trained = any(p.requires_grad for p in self.trunk.parameters())
            # DDP waits for gradients that a frozen trunk never gets.
            network = self.ddp if is_trained else self.trunk
            whole = functools.partial(network, images_per_pass=self.images_per_pass) if in_parts else network
            local = trunk_features(whole, role_slots.pixels, self.precision)
        self._features = local.detach()
        self._awaits_backward = torch.is_grad_enabled() and local.requires_grad
        self._num_encoded += 1  # dropout in the method: the same on every rank, however much the trunk has drawn here
        self._seed_global()
        features = gather(local, role_slots.start, role_slots.total, self.ranks)
        self._gathered = (self._slots(role), features.detach())
        if self._undo is not None and not bool(features.detach().isfinite().all()):  # the same on every rank
            raise NonFiniteError(
                f"the features are not finite at step {self.clock.step} (learning rate {self._rates()}): {self._images_of_step()}"
            )
        return features

    def gradient(
        self,
        role: str | Sequence[str] | None,
        objective: Callable[[Tensor], Tensor],
        extra: Sequence[Tensor] = (),
        shift: Mapping[str, Tensor] | None = None,
    ) -> Gradient:
        return trunk_gradient(
            self.trunk, self.ranks, self.precision, self._role_slots(role), objective, extra, shift, self._value,
            self.images_per_pass,
        )  # fmt: skip

    def jvp(
        self, role: str | Sequence[str] | None, direction: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch features"]]:
        outputs = self._outputs if role == self._kept_role else None
        self._outputs = None  # used once: they take as much memory as a graph
        return trunk_jvp(
            self.trunk, self.ranks, self._role_slots(role), direction, outputs, self._features, self.images_per_pass
        )

    def _role_slots(self, role: str | Sequence[str] | None) -> RoleSlots:
        """This rank's images among the slots of a role."""
        if self._plan_row is None or self._pixels is None:
            raise RuntimeError("there is no batch outside of training_step: use embed_samples instead of encode")
        slots = self._slots(role)
        shard = self.shards[self.ranks.rank]
        local_slots = slots[(slots >= shard.start) & (slots < shard.stop)] - shard.start
        if role is None:
            return RoleSlots(self._pixels, int((slots < shard.start).sum()), len(slots))
        pixels = self._pixels[torch.from_numpy(local_slots).to(self.device, non_blocking=True)]
        return RoleSlots(pixels, int((slots < shard.start).sum()), len(slots))

    def _slots(self, role: str | Sequence[str] | None) -> np.ndarray:
        """The slots of a role, of all ranks."""
        assert self._plan_row is not None
        plan, row = self._plan_row
        if role is None:
            return np.arange(plan.ids.shape[1])
        if "role" not in plan.columns:
            raise RuntimeError(f"encode({role!r}), but the plan has no column 'role'")
        return np.flatnonzero(np.isin(plan.columns["role"][row], [role] if isinstance(role, str) else list(role)))

    def _seed_global(self) -> None:
        """Seeds torch's global generators from (seed, step, calls of encode); 100 times faster than torch.manual_seed."""
        seed = seeded_generator(self.device, self.seed, self.clock.step, 3, self._num_encoded).initial_seed()
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def backward(self, loss: Float[Tensor, ""], retain_graph: bool = False) -> None:
        loss.backward(retain_graph=retain_graph)
        self._checks.add(loss)
        self._awaits_backward = False

    def end_step(self) -> None:
        """Checks the losses that no optimizer has stepped after; several ranks tell each other of a request to stop in any case."""
        if self._checks.losses or (self.ranks.world > 1 and not self._checks.has_read):
            self._read_checks()

    @property
    def stop(self) -> bool:
        """Whether some rank had been asked to stop when this step's losses were read; the same on every rank."""
        return self._checks.stop

    def _read_checks(self, *values: Tensor) -> list[float]:
        """`values`, the largest of all ranks, read together with the losses' checks.

        Raises:
            NonFiniteError: A loss is not finite on some rank.
        """
        not_finite, read = self._checks.read(*values)
        if not_finite:
            assert self._checks.not_finite is not None
            raise NonFiniteError(
                f"the loss is not finite at step {self.clock.step} ({float(self._checks.not_finite)} on rank {self.ranks.rank}): "
                f"no update was applied and the last checkpoint is intact. Lower the learning rate ({self._rates()}) or inspect "
                f"these samples: {self._images_of_step()}"
            )
        return read

    def _value(self, loss: Tensor) -> float:
        """The value of a loss, the same on every rank, checked there."""
        self._checks.add(loss)
        return self._read_checks(loss.detach())[0]

    def undo_step(self) -> None:
        """Takes back what the present step has changed before it was found to be not finite; see `nonfinite`."""
        assert self._undo is not None
        self._undo.undo()

    def _rates(self) -> str:
        return ", ".join(
            f"{name.removeprefix('lr/')} {rate:g}" for name, rate in learning_rates(self.optimizers).items()
        )

    def step_error(self, error: MethodError) -> RunError:
        """A method's error with the step and the batch."""
        return RunError(
            f"step {self.clock.step}: {error}. The last checkpoint is intact. Inspect these samples, or choose another loss: "
            f"{self._images_of_step()}"
        )

    def _images_of_step(self) -> str:
        if self._plan_row is None:
            return "none"
        plan, row = self._plan_row
        if self._gathered is None:
            return name_samples(self.samples, plan.ids[row], None)
        slots, features = self._gathered
        return name_samples(self.samples, plan.ids[row][slots], ~features.isfinite().all(1).cpu().numpy())

    def step(self, optimizer: str) -> None:
        self._check_gradients(optimizer)
        if self.measures_gradients:
            parameters = (p for group in self.optimizers[optimizer].inner.param_groups for p in group["params"])
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            self.gradient_norms[f"gradient/{optimizer}"] = norm
        self.optimizers[optimizer].step(self.clock, self.length)
        self.optimizers[optimizer].inner.zero_grad(set_to_none=True)

    def _check_gradients(self, optimizer: str) -> None:
        """Raises NonFiniteError on all ranks if a loss or a gradient is not finite on one; one pass over the gradients."""
        groups = self.optimizers[optimizer].inner.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        if not self._read_checks(overflows([p.grad for p in parameters], self.device))[0]:
            return
        bad = [p for p in parameters if not bool(p.grad.isfinite().all())]  # or only their sum is not
        if not self.ranks.any(bool(bad), self.device):
            return
        names = {
            id(p): f"{part}.{n}" for part in ("trunk", "method") for n, p in getattr(self, part).named_parameters()
        }
        where = f"{names[id(bad[0])]}, and {len(bad) - 1} more of {len(parameters)}" if bad else "on another rank"
        raise NonFiniteError(
            f"the loss is finite at step {self.clock.step}, but its gradient is not ({where}): this update was not applied "
            f"and the last checkpoint is intact (learning rate {self._rates()}). A distance of zero between two equal images, or the "
            f"square root of zero, has no gradient: inspect these samples: {self._images_of_step()}"
        )

    def embed_samples(self, ids: Int64[np.ndarray, " samples"], embed: bool = True) -> Float[Tensor, "samples dim"]:
        embeddings = self.embedder(self.samples.ids[ids], self.trunk, self.method if embed else None)
        self.trunk.set_mode(True, self.ranks)
        self.method.train()
        return embeddings

    def weights_hash(self) -> str:
        digest = hashlib.sha256()
        for module in (self.trunk, self.method):
            for name, value in module.state_dict().items():
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def learning_rates(optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
    """Current rate of each optimizer's first group."""
    return {f"lr/{name}": o.inner.param_groups[0]["lr"] for name, o in optimizers.items()}
