"""The training loop of one worker: a plain function that runs under Ray Train, under torchrun and in one process.

    plan -> loader -> trunk -> gather -> method -> backward -> step

A checkpoint contains everything that is needed to continue; running the loop again continues from the newest one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from methods.base import Batch, MethodError
from methods.config import Clock, Length
from methods.plans import Plan
from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.hang_watch import HangWatch
from pipeline.distributed.run_status import RunStatus, RunStatusProxy
from pipeline.errors import NonFiniteError, RunError
from pipeline.evaluation.embedder import build_embedder
from pipeline.mining.transport import Transport
from pipeline.model.cached_gradients import fits_gpu, largest_fitting
from pipeline.model.layers import prepare_training
from pipeline.model.network import build_network, num_classes
from pipeline.runs.checkpoint import TRAINING, Checkpoints, TrainingState
from pipeline.runs.run_folder import read_changes, run_folder
from pipeline.runs.tracking import Tracker
from pipeline.storage import Folder
from pipeline.training.batches import PlannedBatches
from pipeline.training.context import RunContext, learning_rates
from pipeline.training.measurements import Measurements
from pipeline.training.nonfinite import count_skipped
from pipeline.training.parts import build_mining, image_source
from pipeline.training.step_checks import read_logs
from pipeline.training.weight_average import WeightAverage

SHOW_EVERY_S = 0.3  # between two reads of a GPU's values for the display alone, which make the step wait
MOST_IMAGES = 4096  # of one pass through the trunk that `runtime.images_per_pass: auto` tries


class Worker:
    """One worker's share of a run.

    Args:
        config: The resolved configuration of the run.
        store_uri: URI of the prepared dataset.
        ranks: This worker's rank and the collectives.
        device: Device of trunk and method.
        status: Receives progress and messages, and passes on stop requests.
        report: Called on every rank with the metrics of each validation (Ray Train's report), if given.
        servers: Transports to the run's mining servers, if the method mines; empty: one server in this process.
        watch: Ends this process if a step hangs, where it is started again.
    """

    def __init__(
        self,
        config: Config,
        store_uri: str,
        ranks: Ranks,
        device: torch.device,
        status: RunStatus | RunStatusProxy,
        report: Callable[[dict[str, Any]], None] | None = None,
        servers: Sequence[Transport] = (),
        watch: HangWatch | None = None,
    ) -> None:
        self.watch = watch or HangWatch("", None, status.add_message)
        self.config = config
        self.ranks = ranks
        self.status = status
        torch.use_deterministic_algorithms(config.runtime.deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.store = Store(Folder(store_uri))
        self.samples = self.store.select(["train"], without_fold=config.data.validation_fold)
        self.embedder = build_embedder(
            config, self.store, device, ranks, config.runtime.loader, config.runtime.loader_cpus
        )
        self.trunk, self.method = build_network(config, num_classes(self.samples), device)
        if config.model.compile:
            self.trunk.compile_backbone()
        trained_parts = prepare_training(self.trunk.backbone, config.model)
        self.run = run_folder(config)
        self.checkpoints = Checkpoints(self.run, config.checkpoint.keep)
        self.mining = build_mining(config, len(self.samples), servers, ranks, device)
        self.context = RunContext(
            samples=self.samples, seed=config.seed, length=config.length, precision=config.precision, device=device,
            ranks=ranks, trunk=self.trunk, method=self.method, embedder=self.embedder, load_best=self._load_best,
            mining=self.mining, undoes=config.runtime.skip_nonfinite > 0, images_per_pass=self._images_per_pass(device),
            trained_parts=trained_parts, asked_to_stop=status.stop_requested,
        )  # fmt: skip
        self.average = WeightAverage(self.trunk, self.method, config.model.ema) if config.model.ema else None
        self.progress = TrainingState()
        self.batches = PlannedBatches(
            self.method, self.context, self.samples, image_source(config, self.store),
            length=config.length, runtime=config.runtime, ranks=ranks, start_epoch=self._start_epoch,
        )  # fmt: skip
        self.measurements = Measurements(
            config, self.store, self.embedder, self.trunk, self.method, self.checkpoints,
            save=self._save, load_best=self._load_best, publish=self._publish,
            say=status.add_message, tell=self._tell_validation, report=report, average=self.average,
        )  # fmt: skip
        self.tracker: Tracker | None = None
        self._shown: dict[str, float] = {}  # the values that were read last, and when
        self._shown_at = -SHOW_EVERY_S

    def _images_per_pass(self, device: torch.device) -> int | None:
        """`runtime.images_per_pass`, where it is `auto` measured by the first worker."""
        asked, size = self.config.runtime.images_per_pass, self.config.data.transforms.size
        if asked != "auto":
            return asked
        found = 0
        if self.ranks.rank == 0:
            self.trunk.set_mode(True, self.ranks)
            precision = self.config.precision
            found = largest_fitting(MOST_IMAGES, lambda images: fits_gpu(self.trunk, images, size, precision, device))
            self.status.add_message(
                f"runtime.images_per_pass: auto found room for {found:,} images of a worker in one pass"
            )
        return int(self.ranks.broadcast(found))

    # ---- the run -------------------------------------------------------------------------------------------------

    def __call__(self) -> None:
        """Restores, trains to the end or to a stop request, and measures the test classes at the end."""
        self._restore()
        if self.ranks.rank == 0:
            self.tracker = Tracker(self.run, self.progress.step)
        try:
            if not self.progress.frozen:
                self.measurements.frozen(self.progress, self.tracker)
            stopped = False
            while not stopped and not self._done():
                stopped = self._train_segment()
            if not stopped and not self.progress.finished:
                self.measurements.final(self.progress, self.tracker)
        except BaseException:
            self.watch.end_step()
            with contextlib.suppress(
                OSError, RunError
            ):  # on a full disk the log fails too: the first error is the one to tell
                self._close()
            raise
        self._close()

    def _close(self) -> None:
        try:
            if self.tracker is not None:
                # A process that no longer owns the run must not replace the newer process's log.
                self.tracker.close(sync=self.checkpoints.is_owner())
        finally:
            if self.mining is not None:
                self.mining.close()

    def _restore(self) -> None:
        if self.ranks.rank == 0:
            self.checkpoints.acquire()
        self.checkpoints.incarnation = self.ranks.broadcast(self.checkpoints.incarnation)
        if self.ranks.rank == 0:
            self.status.update({"group": self.checkpoints.incarnation})
        steps = self.ranks.broadcast(self.checkpoints.steps() if self.ranks.rank == 0 else None)
        if self.mining is not None:
            snapshot = self.checkpoints.folder("checkpoints", steps[-1]) / "mining" if steps else None
            self.mining.begin(self.checkpoints.incarnation, snapshot)
        if not steps:
            return
        step = steps[-1]
        self.progress = self.checkpoints.progress("checkpoints", step)
        copied = any("copied_from_trial" in line and line["step"] == step for line in read_changes(self.run))
        self.batches.stored = self.checkpoints.load(
            "checkpoints", step, self.trunk, self.method, self.context.optimizers, saved_options=not copied
        )
        if self.average is not None:
            trained = self.checkpoints.tensors("checkpoints", step, TRAINING)
            with self.checkpoints.fitting("checkpoints", step):
                self.average.restore(trained)
        self._tell_best()
        if self.ranks.rank == 0 and step:
            self.status.add_message(f"resumed at step {step} (epoch {self.progress.epoch + 1})")
        if not self._done():
            self.progress.finished = False  # the run was made longer

    def _train_segment(self) -> bool:
        """Trains on the plans that can be made now, through one loader; returns True after a stop request."""
        started = time.perf_counter()
        plans = self.batches.plans_ahead(self.progress)  # mining over the whole set is here
        self.progress.seconds += time.perf_counter() - started
        with contextlib.closing(self.batches.pixels(plans, self.progress)) as pixel_stream:
            return self._train_plans(plans, pixel_stream)

    def _train_plans(self, plans: list[tuple[int, Plan]], pixel_stream: Iterator[Tensor]) -> bool:
        fetched = False
        for epoch, plan in plans:
            if self.progress.step_in_epoch or not self.method.plan_is_stored:
                self._start_epoch(epoch)
            for row in range(self.progress.step_in_epoch, len(plan)):
                before = self._clock(plan)
                if self.config.length.fraction_done(before) >= 1:
                    return False
                # fetch
                started = time.perf_counter()
                if fetched:  # the first images may have to be copied to this node
                    self.watch.begin_step(self.progress.step)
                pixels = next(pixel_stream)
                fetched = True
                waited = time.perf_counter() - started
                # gather, method, backward, step
                self.watch.begin_step(self.progress.step)
                batch = self.context.begin_step(before, plan, row, pixels)
                self.context.measures_gradients = self.tracker is not None and self._is_logged(self.progress.step + 1)
                logs = self._training_step(batch)
                skipped = logs is None
                if self.mining is not None:
                    logs = {**(logs or {}), **self.mining.logs()}
                # count
                progress = self.progress
                progress.step += 1
                progress.step_in_epoch = row + 1
                progress.images += 0 if skipped else plan.ids.shape[1]
                progress.seconds += time.perf_counter() - started
                progress.waited_s += waited
                if self.average is not None and not skipped:
                    self.average.update(progress.step - progress.skipped_steps)
                after = self._clock(plan)
                if row + 1 == len(plan):
                    progress.epoch = epoch + 1
                    progress.step_in_epoch = 0
                self._log(logs or {}, after, plan)
                # evaluate, save
                last = self.config.length.fraction_done(after) >= 1
                metrics = None
                if last or _crossed(self.config.evaluation.every, before, after):
                    metrics = self.measurements.validate(after, progress, self.tracker)
                if self.mining is not None and _crossed(self.config.mining.rebuild_every, before, after):
                    self.mining.rebuild()
                if row + 1 == len(plan):
                    self.batches.stored = None
                    self.method.on_epoch_end(epoch, self.context, metrics)
                stop = self._is_asked_to_stop(metrics is not None)
                if stop or last or _crossed(self.config.checkpoint.every, before, after):
                    self._save("checkpoints")
                if stop and not last:
                    if self.ranks.rank == 0:
                        self.status.add_stopped(progress.step)
                    return True
        return False

    def _is_asked_to_stop(self, now: bool) -> bool:
        """Whether to stop after this step, the same on every rank: by what its checks have read, or `now`, by a read of its own."""
        if now or self.ranks.world == 1:
            return self.ranks.any(self.status.stop_requested(), self.context.device)
        return self.context.stop

    def _training_step(self, batch: Batch) -> Mapping[str, float | Tensor] | None:
        """The method's step and its metrics; None: it was left out, as its loss or gradient was not finite."""
        progress = self.progress
        try:
            logs = self.method.training_step(batch, self.context)
            self.context.end_step()
        except MethodError as error:
            raise self.context.step_error(error) from error
        except NonFiniteError as error:
            message = count_skipped(error, progress, self.config.runtime.skip_nonfinite)
            if message is not None and self.ranks.rank == 0:
                self.status.add_message(message)
            self.context.undo_step()
            return None
        finally:
            self.watch.end_step()
        progress.skipped_in_a_row = 0
        return {**logs, **self.context.gradient_norms}

    # ---- epochs and clocks ---------------------------------------------------------------------------------------

    def _start_epoch(self, epoch: int) -> None:
        self.context.begin_epoch(Clock(self.progress.step, float(epoch)), epoch)
        self.method.on_epoch_start(epoch, self.context)

    def _clock(self, plan: Plan) -> Clock:
        progress = self.progress
        return Clock(progress.step, progress.epoch + progress.step_in_epoch / len(plan))

    def _done(self) -> bool:
        progress = self.progress
        fraction = 0.0
        if progress.step_in_epoch:
            fraction = progress.step_in_epoch / len(self.batches.plan(progress.epoch))
        return self.config.length.fraction_done(Clock(progress.step, progress.epoch + fraction)) >= 1

    # ---- log, save -----------------------------------------------------------------------------------------------

    def _log(self, logs: Mapping[str, float | Tensor], clock: Clock, plan: Plan) -> None:
        """Logs a step where a line is due and shows it; values on a GPU are read for a line, and now and then to be shown."""
        if self.ranks.rank != 0 or self.tracker is None:
            return
        progress = self.progress
        due = self._is_logged(progress.step)
        values = self._read(logs, due)
        seconds = max(progress.seconds, 1e-9)
        speed = {"images_per_second": progress.images / seconds, "waiting": progress.waited_s / seconds}
        total = self.config.length.steps(len(plan))
        if progress.skipped_steps:
            values = values | {"skipped_steps": float(progress.skipped_steps)}
        position = {"step": progress.step, "total": total, "epoch": round(clock.epoch, 4), "images": progress.images}
        self._publish({"phase": "training", **position, **speed, **values})
        if due:
            values = {"epoch": round(clock.epoch, 4), **values, **learning_rates(self.context.optimizers)}
            self.tracker.log(progress.step, "train", values | speed)

    def _is_logged(self, step: int) -> bool:
        return step % self.config.runtime.log_every == 0 or step == 1

    def _read(self, logs: Mapping[str, float | Tensor], due: bool) -> dict[str, float]:
        """The step's values, or those that were read last: on a GPU they are read where a line is due, and every `SHOW_EVERY_S`."""
        now = time.monotonic()
        if due or self.context.device.type == "cpu" or now - self._shown_at >= SHOW_EVERY_S:
            self._shown_at = now
            try:
                self._shown = read_logs(logs)
            except MethodError as error:
                raise self.context.step_error(error) from error
        return self._shown

    def _tell_validation(self, point: dict[str, Any]) -> None:
        self._tell_best()
        self.status.add_validation(point)

    def _tell_best(self) -> None:
        progress = self.progress
        if self.ranks.rank == 0 and progress.best_step >= 0:
            self.status.update({"best": {"step": progress.best_step, **progress.best_metrics}})

    def _publish(self, progress: dict[str, Any]) -> None:
        if self.ranks.rank == 0:
            self.status.publish(progress)

    def _save(self, kind: str) -> None:
        """Saves a checkpoint below "checkpoints", or the weights alone below "best"."""
        if self.ranks.rank == 0:
            plan, mining = (self.batches.stored, self.mining) if kind == "checkpoints" else (None, None)

            def write_extra(folder: Folder) -> None:
                if mining is not None:
                    mining.save(folder / "mining")
                if self.tracker is not None:
                    self.tracker.sync()  # before the checkpoint is complete: a resumed run then has these metrics

            training = self.average.trained() if self.average and kind == "checkpoints" else None
            with self.average.applied() if self.average else contextlib.nullcontext():
                self.checkpoints.save(
                    kind, self.progress, self.trunk, self.method, self.context.optimizers, plan, write_extra, training
                )
            if mining is not None:
                mining.prune([self.checkpoints.folder(kind, step) for step in self.checkpoints.steps()])
        self.ranks.barrier()

    def _load_best(self) -> None:
        self.checkpoints.load("best", self.progress.best_step, self.trunk, self.method)


def _crossed(every: Length, before: Clock, after: Clock) -> bool:
    """True if a multiple of `every` lies between two clocks."""
    if not every.value:
        return False
    return int(after.elapsed(every.unit) / every.value + 1e-9) > int(before.elapsed(every.unit) / every.value + 1e-9)
