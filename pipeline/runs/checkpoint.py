"""Checkpoints: the whole state that a run needs to continue to the same weights, written whole or not at all.

    checkpoints/step-00000077/
        trunk.safetensors, method.safetensors   weights and buffers
        training.safetensors                    with an average of weights (model.ema), which the two hold then: those that are trained
        optimizers.pt                           moments (tensors only, read with weights_only=True)
        plan.npz                                the current epoch's plan, where it cannot be recomputed
        checkpoint.json                         position, metrics, checksums; written last: without it, no checkpoint
    best/step-00000077/                         the weights that validated best, in the same form

A run folder belongs to one start of the run at a time: a later start writes its number into the
file `incarnation`, and an older process that is still running reads it and stops before it writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from methods.optim import Optimizer
from methods.plans import Plan
from pipeline.errors import DivergedError, RunError, UserError, joined_lines, one_line
from pipeline.runs.run_folder import CHECKPOINT, INCARNATION, checkpoint_folder, step_of
from pipeline.storage import Folder

TRUNK, METHOD, TRAINING = "trunk.safetensors", "method.safetensors", "training.safetensors"


@dataclass
class TrainingState:
    """The state of a run beside its tensors.

    Attributes:
        step: Steps done.
        epoch: Epoch that the next step belongs to.
        step_in_epoch: Steps done of that epoch.
        seconds: Time spent in training steps, over all starts.
        waited_s: The part of `seconds` spent waiting for data.
        validation_s: Time spent in evaluations of the validation task, not part of `seconds`.
        images: Number of images trained on.
        frozen: Metrics of the untrained trunk on the test classes.
        frozen_validation: Those on the validation task; empty without one, and in runs of earlier versions.
        best_step, best_metrics: The best validation so far; -1 and empty before the first.
        finished: The run has reached its length.
        skipped_steps: Number of steps that were left out (`runtime.skip_nonfinite`).
        skipped_in_a_row: How many of them are the newest steps.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    validation_s: float = 0.0
    images: int = 0
    frozen: dict[str, float] = field(default_factory=dict)
    frozen_validation: dict[str, float] = field(default_factory=dict)
    best_step: int = -1
    best_metrics: dict[str, float] = field(default_factory=dict)
    finished: bool = False
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


class Checkpoints:
    """Reads and writes the checkpoints of one run folder.

    Args:
        run: The run folder.
        keep: Number of resumable checkpoints that are kept.
        incarnation: Number of this start; 0 for readers.
    """

    def __init__(self, run: Folder, keep: int = 2, incarnation: int = 0) -> None:
        self.run = run
        self.keep = keep
        self.incarnation = incarnation

    def acquire(self) -> int:
        """Becomes the owner of the run folder; returns the number of this start."""
        self.incarnation = self._current() + 1
        self.run.write_json(INCARNATION, self.incarnation)
        return self.incarnation

    def _current(self) -> int:
        return int(self.run.read_json(INCARNATION)) if self.run.exists(INCARNATION) else 0

    def steps(self, kind: str = "checkpoints") -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        steps = [step for name in self.run.names(kind) if (step := step_of(name)) is not None]
        return sorted(step for step in steps if self.run.exists(f"{checkpoint_folder(kind, step)}/{CHECKPOINT}"))

    def folder(self, kind: str, step: int) -> Folder:
        """The folder of a checkpoint."""
        return self.run / checkpoint_folder(kind, step)

    def save(
        self,
        kind: str,
        progress: TrainingState,
        trunk: nn.Module,
        method: nn.Module,
        optimizers: Mapping[str, Optimizer],
        plan: Plan | None = None,
        write_extra: Callable[[Folder], None] | None = None,
        training: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Writes a checkpoint of `progress.step` below `kind` ("checkpoints" or "best"), then removes older ones.

        `write_extra` writes further files into its folder, before it counts as complete. `training` are the weights that are trained,
        where the network has an average of them.

        Raises:
            RunError: Another process now owns the run, or a tensor is not finite; nothing has been
                written then. Or the checkpoint cannot be written (a full disk): its files are removed again.
        """
        self._require_owner()
        tensors = {**trunk.state_dict(), **{f"method.{n}": t for n, t in method.state_dict().items()}}
        finite = {n: t.isfinite().all() for n, t in tensors.items() if t.is_floating_point()}
        read = torch.stack(list(finite.values())).tolist()  # the device is waited for once
        bad = [n for n, is_finite in zip(finite, read, strict=True) if not is_finite]
        if bad:
            raise DivergedError(
                f"{len(bad)} of {len(tensors)} tensors are not finite at step {progress.step} (first: {bad[0]}): the "
                "previous checkpoint is kept. Lower the learning rate, or clip gradients"
            )
        base = checkpoint_folder(kind, progress.step)
        buffer = io.BytesIO()
        state: dict[str, Any] = {"optimizers": {name: o.inner.state_dict() for name, o in optimizers.items()}}
        torch.save(state, buffer)
        files = {
            TRUNK: save_safetensors(cpu_tensors(trunk)),
            METHOD: save_safetensors(cpu_tensors(method)),
            "optimizers.pt": buffer.getvalue(),
        }
        if training is not None:
            files[TRAINING] = save_safetensors(dict(training))
        if plan is not None:
            files["plan.npz"] = _pack(plan)
        if self.run.exists(f"{base}/{CHECKPOINT}"):  # the same step again, after a resume: never a mixture of two
            self.run.remove(f"{base}/{CHECKPOINT}")
        try:
            for name, data in files.items():
                self.run.write(f"{base}/{name}", data)
            if write_extra is not None:
                write_extra(self.folder(kind, progress.step))
            checksums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
            record = {"progress": asdict(progress), "incarnation": self.incarnation, "sha256": checksums}
            self.run.write_json(f"{base}/{CHECKPOINT}", record)
        except (OSError, RunError) as error:
            raise self._unwritten(base, error) from error
        if kind == "checkpoints":
            self._prune()

    def _unwritten(self, base: str, error: OSError | RunError) -> RunError:
        """Removes what was written of a checkpoint, to free its space, and says what is left."""
        with contextlib.suppress(OSError):
            self.run.remove(base)
        steps = self.steps()
        kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "there is no earlier checkpoint"
        reason = f"{error.strerror or one_line(error)}" if isinstance(error, OSError) else one_line(error)
        return RunError(
            f"the checkpoint {self.run}/{base} cannot be written ({reason}); {kept}: make room and run the same command again"
        )

    def update(self, progress: TrainingState) -> None:
        """Replaces the progress of the checkpoint of `progress.step`, whose tensors stay, in one write.

        Raises:
            RunError: Another process now owns the run.
        """
        self._require_owner()
        name = f"{checkpoint_folder('checkpoints', progress.step)}/{CHECKPOINT}"
        self.run.write_json(name, self.run.read_json(name) | {"progress": asdict(progress)})

    def is_owner(self) -> bool:
        """True unless a later start of the run owns its folder."""
        return self._current() == self.incarnation

    def _require_owner(self) -> None:
        current = self._current()
        if current != self.incarnation:
            raise RunError(
                f"another process (attempt {current}) now owns the run {self.run}: stopping this one (attempt "
                f"{self.incarnation})"
            )

    def _prune(self) -> None:
        """Removes older and unfinished checkpoints, and every best one that no kept checkpoint refers to."""
        last_steps = self.steps()[-self.keep :]
        best_steps = [self.progress("checkpoints", step).best_step for step in last_steps]
        for kind, steps in (("checkpoints", last_steps), ("best", best_steps)):
            for name in self.run.names(kind):
                step = step_of(name)
                if step is not None and step < last_steps[-1] and step not in steps:
                    self.run.remove(f"{kind}/{name}")

    def latest(self) -> TrainingState | None:
        """Progress of the newest complete checkpoint; None if there is none."""
        steps = self.steps()
        return self.progress("checkpoints", steps[-1]) if steps else None

    def progress(self, kind: str, step: int) -> TrainingState:
        record = self.run.read_json(f"{checkpoint_folder(kind, step)}/{CHECKPOINT}")
        return TrainingState(**record["progress"])

    def checksums(self, kind: str, step: int) -> dict[str, str]:
        """SHA-256 of the files of a checkpoint, by name."""
        record: dict[str, str] = self.run.read_json(f"{checkpoint_folder(kind, step)}/{CHECKPOINT}")["sha256"]
        return record

    def tensors(self, kind: str, step: int, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint's file, TRUNK, METHOD or TRAINING.

        Raises:
            UserError: It is missing or damaged.
        """
        data = self._read(kind, step, name)
        with self.fitting(kind, step):
            return load_safetensors(data)

    @contextlib.contextmanager
    def fitting(self, kind: str, step: int) -> Iterator[None]:
        """A block that puts a checkpoint's tensors into a network: those that do not fit become a UserError."""
        try:
            yield
        except (RuntimeError, SafetensorError) as error:
            base = f"{self.run}/{checkpoint_folder(kind, step)}"
            raise UserError(f"{base} does not fit the configured model: {joined_lines(error)}") from error

    def _read(self, kind: str, step: int, name: str) -> bytes:
        """A file of a checkpoint, whose checksum is right."""
        base = checkpoint_folder(kind, step)
        path = f"{base}/{name}"
        data = self.run.read(path) if self.run.exists(path) else None
        if data is None or hashlib.sha256(data).hexdigest() != self.checksums(kind, step)[name]:
            problem = "missing" if data is None else "damaged (checksum)"
            raise UserError(f"{self.run}/{path} is {problem}: remove {base} to resume from the previous checkpoint")
        return data

    def load(
        self,
        kind: str,
        step: int,
        trunk: nn.Module,
        method: nn.Module | None,
        optimizers: Mapping[str, Optimizer] | None = None,
        saved_options: bool = True,
    ) -> Plan | None:
        """Puts a checkpoint's tensors into place; returns its stored plan.

        Args:
            kind, step: "checkpoints" or "best", and the step.
            trunk, method, optimizers: What is loaded into.
            saved_options: The optimizers' learning rates and other options are the saved ones too; False: they stay as
                configured, for a checkpoint of a run with another setting.

        Raises:
            UserError: A file is damaged (named), or the tensors do not fit.
        """
        base = checkpoint_folder(kind, step)
        with self.fitting(kind, step):
            trunk.load_state_dict(self.tensors(kind, step, TRUNK))
            if method is not None:
                method.load_state_dict(self.tensors(kind, step, METHOD))
        if optimizers is None:
            return None
        try:
            optimizers_state = self._read(kind, step, "optimizers.pt")
            state = torch.load(io.BytesIO(optimizers_state), map_location="cpu", weights_only=True)
            plan = _unpack(self._read(kind, step, "plan.npz")) if "plan.npz" in self.checksums(kind, step) else None
        except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{self.run}/{base} contains objects other than tensors ({one_line(error)}): remove {base}"
            ) from error
        for name, optimizer in optimizers.items():
            options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.inner.param_groups]
            optimizer.inner.load_state_dict(state["optimizers"][name])
            for group, configured in zip(optimizer.inner.param_groups, options, strict=True):
                group.update({} if saved_options else configured)
        return plan


def cpu_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module as safetensors takes them: contiguous copies on the CPU."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}


def _pack(plan: Plan) -> bytes:
    """A plan as npz: its columns may hold text, which tensors cannot.

    Random ids do not compress: they take the least bytes that hold them. A column that every step
    shares is stored once.
    """
    buffer = io.BytesIO()
    columns: dict[str, Any] = {
        f"column.{name}": column if column.strides[0] else column[:1] for name, column in plan.columns.items()
    }
    np.savez(buffer, ids=plan.ids.astype(np.min_scalar_type(plan.ids.max())), **columns)
    return buffer.getvalue()


def _unpack(data: bytes) -> Plan:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        ids = arrays["ids"].astype(np.int64)
        columns = {n: np.broadcast_to(arrays[n], ids.shape) for n in arrays.files if n != "ids"}
        return Plan(ids, {n.removeprefix("column."): column for n, column in columns.items()})
