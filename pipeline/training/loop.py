"""The training loop of one worker: a plain function that runs under Ray Train, under torchrun and in one process.

    plan -> loader -> trunk -> gather -> method -> backward -> step

Everything that is needed to continue stands in one checkpoint; running the loop again continues from the newest.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods import METHODS
from methods.config import Clock, Length
from methods.plans import Plan
from pipeline.config import Config
from pipeline.data.loader import Item, PixelSource, load
from pipeline.data.store import Store
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.run_status import Board, RemoteBoard
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.evaluate_task import Result, evaluate
from pipeline.evaluation.tasks import Task, test_task, validation_task
from pipeline.mining.transport import Transport
from pipeline.model.trunk import build_trunk
from pipeline.runs.checkpoint import Checkpoints, Progress
from pipeline.runs.run_folder import read_changes, run_folder
from pipeline.runs.summary import summarise
from pipeline.runs.tracking import Tracker
from pipeline.storage import Folder
from pipeline.training.context import RunContext, learning_rates
from pipeline.training.parts import pixel_source, run_mining

SEGMENT_STEPS = 512  # plans that are known ahead are loaded by one pipeline of at least so many steps


class Worker:
    """One worker's share of a run.

    Args:
        config: of the run, resolved.
        store_uri: of the prepared dataset.
        ranks: this worker's place.
        device: to compute on.
        board: to tell progress to, and to hear of a stop request.
        report: called on every rank with the metrics of each validation (Ray Train's report), if given.
        servers: the run's mining servers, if the method mines; none: one in this process.
    """

    def __init__(
        self,
        config: Config,
        store_uri: str,
        ranks: Ranks,
        device: torch.device,
        board: Board | RemoteBoard,
        report: Callable[[dict[str, Any]], None] | None = None,
        servers: Sequence[Transport] = (),
    ) -> None:
        self.config, self.ranks, self.board, self.report = config, ranks, board, report
        torch.use_deterministic_algorithms(config.runtime.deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.store = Store(Folder(store_uri))
        self.samples = self.store.select(["train"], without_fold=config.data.validation_fold)
        self.validation = validation_task(config, self.store)
        source = pixel_source(config, self.store)
        evaluation_source = PixelSource(source.uri, source.fingerprint, None, source.transforms)
        self.source = source
        r = config.runtime
        self.embedder = Embedder(
            evaluation_source, r.loader, r.loader_cpus, config.evaluation.batch_size, config.precision, device, ranks
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # the same initial weights on every rank
            self.trunk = build_trunk(config.model, config.data.transforms.size)
            num_classes = int(self.samples.labels.max()) + 1
            self.method = METHODS[config.method.name](config.method, self.trunk.features, num_classes)
        dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.trunk.to(device, dtype)
        self.method.to(device, dtype)
        self.run = run_folder(config)
        self.checkpoints = Checkpoints(self.run, config.checkpoint.keep)
        self.mining = run_mining(config, len(self.samples), servers, ranks, device)
        self.context = RunContext(
            self.samples, config.seed, config.length, config.precision, device, ranks, self.trunk, self.method,
            self.embedder, self._load_best, self.mining,
        )  # fmt: skip
        self.progress = Progress()
        self.plan: Plan | None = None  # of the current epoch, where it cannot be recomputed
        self.tracker: Tracker | None = None

    # ---- the run -------------------------------------------------------------------------------------------------

    def __call__(self) -> None:
        """Restores, trains to the end or to a stop request, and measures the test classes at the end."""
        self._restore()
        if self.ranks.rank == 0:
            self.tracker = Tracker(self.run, self.progress.step)
        try:
            if not self.progress.frozen:
                self._measure_frozen()
            stopped = False
            while not stopped and not self._done():
                stopped = self._train_segment()
            if not stopped and not self.progress.finished:
                self._measure_final()
        finally:
            if self.tracker is not None:
                self.tracker.close(sync=self.checkpoints.owned())  # else it would replace the newer process's log
            if self.mining is not None:
                self.mining.close()

    def _restore(self) -> None:
        if self.ranks.rank == 0:
            self.checkpoints.begin()
        self.checkpoints.incarnation = self.ranks.broadcast(self.checkpoints.incarnation)
        steps = self.ranks.broadcast(self.checkpoints.steps() if self.ranks.rank == 0 else None)
        if self.mining is not None:
            snapshot = self.checkpoints.folder("checkpoints", steps[-1]) / "mining" if steps else None
            self.mining.begin(self.checkpoints.incarnation, snapshot)
        if not steps:
            return
        step = steps[-1]
        self.progress = self.checkpoints.progress("checkpoints", step)
        self.plan = self.checkpoints.load("checkpoints", step, self.trunk, self.method, self.context.optimizers)
        if self.ranks.rank == 0 and step:
            self.board.notice(f"resumed at step {step} (epoch {self.progress.epoch + 1})")
        if not self._done():
            self.progress.finished = False  # the run was made longer

    def _train_segment(self) -> bool:
        """Trains on the plans that are known now, through one loader; returns whether a stop was asked for."""
        plans = self._known_plans()
        stream = self._pixels(plans)
        for epoch, plan in plans:
            if self.progress.step_in_epoch or not self.method.plan_is_stored:
                self._start_epoch(epoch)
            for row in range(self.progress.step_in_epoch, len(plan)):
                before = self._clock(plan)
                if self.config.length.share(before) >= 1:
                    return False
                # fetch
                started = time.perf_counter()
                pixels = next(stream)
                waited = time.perf_counter() - started
                # gather, method, backward, step
                batch = self.context.begin_step(before, plan, row, pixels)
                logs = self.method.training_step(batch, self.context)
                if self.mining is not None:
                    logs = logs | self.mining.logs()
                # count
                p = self.progress
                p.step, p.step_in_epoch, p.images = p.step + 1, row + 1, p.images + plan.ids.shape[1]
                p.seconds, p.waited_s = p.seconds + time.perf_counter() - started, p.waited_s + waited
                after = self._clock(plan)
                if row + 1 == len(plan):
                    p.epoch, p.step_in_epoch = epoch + 1, 0
                self._log(logs, after, plan)
                # evaluate, save
                last = self.config.length.share(after) >= 1
                metrics = (
                    self._validate(after) if self._due(self.config.evaluation.every, before, after) or last else None
                )
                if self.mining is not None and self._due(self.config.mining.rebuild_every, before, after):
                    self.mining.rebuild()
                if row + 1 == len(plan):
                    self.plan = None
                    self.method.on_epoch_end(epoch, self.context, metrics)
                stop = self.ranks.any(self.board.stopping(), self.context.device)
                if stop or last or self._due(self.config.checkpoint.every, before, after):
                    self._save("checkpoints")
                if stop and not last:
                    if self.ranks.rank == 0:
                        self.board.notice(f"stopped at step {p.step}: saved; the same command continues")
                    return True
        return False

    # ---- plans and pixels ----------------------------------------------------------------------------------------

    def _start_epoch(self, epoch: int) -> None:
        self.context.begin_epoch(Clock(self.progress.step, float(epoch)), epoch)
        self.method.on_epoch_start(epoch, self.context)

    def _known_plans(self) -> list[tuple[int, Plan]]:
        """The current epoch's plan, and the following ones where they are pure, up to a segment's length."""
        epoch, method = self.progress.epoch, self.method
        if method.plan_is_stored:
            if self.plan is None:
                self._start_epoch(epoch)
                self.plan = method.plan(epoch, self.context)
            return [(epoch, self.plan)]
        plans: list[tuple[int, Plan]] = []
        known, wanted = -self.progress.step_in_epoch, float(SEGMENT_STEPS)
        if self.config.length.unit == "steps":
            wanted = min(wanted, self.config.length.value - self.progress.step)
        while known < wanted:
            if self.config.length.unit == "epochs" and epoch >= self.config.length.value:
                break
            plans.append((epoch, method.plan(epoch, self.context)))
            known += len(plans[-1][1])
            epoch += 1
        return plans

    def _pixels(self, plans: list[tuple[int, Plan]]) -> Iterator[Tensor]:
        """Pixels of this rank's slots for the steps to come."""
        p, length = self.progress, self.config.length
        most = max(0, round(length.value) - p.step) if length.unit == "steps" else None
        items = islice(self._items(plans, p.step, p.step_in_epoch), most)
        return load(self.source, items, self.config.runtime.loader, self.config.runtime.loader_cpus)

    def _items(self, plans: list[tuple[int, Plan]], step: int, row: int) -> Iterator[Item]:
        """This rank's slots from a row of the first plan on, each made when it is asked for: plans are long."""
        for epoch, plan in plans:
            own = self.ranks.slice(plan.ids.shape[1])
            for ids in plan.ids[row:, own]:
                yield Item(self.samples.ids[ids], (epoch, step, own.start))
                step += 1
            row = 0

    def _clock(self, plan: Plan) -> Clock:
        p = self.progress
        return Clock(p.step, p.epoch + p.step_in_epoch / len(plan))

    def _done(self) -> bool:
        p = self.progress
        fraction = 0.0
        if p.step_in_epoch:
            plan = self.plan or self.method.plan(p.epoch, self.context)
            fraction = p.step_in_epoch / len(plan)
        return self.config.length.share(Clock(p.step, p.epoch + fraction)) >= 1

    @staticmethod
    def _due(every: Length, before: Clock, after: Clock) -> bool:
        """Whether a multiple of `every` lies between two clocks."""
        if not every.value:
            return False
        return int(after.passed(every.unit) / every.value + 1e-9) > int(before.passed(every.unit) / every.value + 1e-9)

    # ---- measure, log, save --------------------------------------------------------------------------------------

    def _measure_frozen(self) -> None:
        """The pretrained trunk's pooled features on the test classes, so that every run shows what training added."""
        task = self._test_task()
        if task is not None:
            self._say({"phase": "evaluating the frozen trunk"})
            result = evaluate(task, self.embedder, self.trunk, None, self.config.evaluation.recall_at)
            self.progress.frozen = result.metrics
            if self.tracker is not None:
                self.tracker.log(0, "frozen", result.metrics)
        else:
            self.progress.frozen = {"queries": 0.0}
        self._save("checkpoints")

    def _test_task(self) -> Task | None:
        return test_task(self.config, self.store) if self.config.evaluation.test else None

    def _validate(self, clock: Clock) -> dict[str, float] | None:
        if self.validation is None:
            return None
        self._say({"phase": "validating"})
        metrics = evaluate(
            self.validation, self.embedder, self.trunk, self.method, self.config.evaluation.recall_at
        ).metrics
        p, name = self.progress, self.config.evaluation.metric
        if self.tracker is not None:
            self.tracker.log(p.step, "validation", {"epoch": round(clock.epoch, 4), **metrics})
        if p.best_step < 0 or metrics[name] > p.best_metrics[name]:
            p.best_step, p.best_metrics = p.step, metrics
            self._save("best")
        if self.report is not None:
            self.report({"step": p.step, "epoch": clock.epoch, **metrics})
        return metrics

    def _measure_final(self) -> None:
        """The figures of the run: the chosen checkpoint on the test classes, once."""
        config, p = self.config, self.progress
        if config.evaluation.checkpoint == "best":
            self._load_best()
        task = self._test_task()
        metrics: dict[str, Any] = {}
        if task is not None:
            self._say({"phase": "evaluating on the test classes"})
            e = config.evaluation
            result = evaluate(task, self.embedder, self.trunk, self.method, e.recall_at, e.clustering)
            metrics = result.metrics
            if self.ranks.rank == 0:
                self._keep_neighbours(result)
        if self.tracker is not None:
            if metrics:
                self.tracker.log(p.step, "test", metrics)
            self.tracker.sync()
        if self.ranks.rank == 0:
            self.run.write_json("summary.json", summarise(config, self.store, p, metrics, read_changes(self.run)))
        p.finished = True
        if self.ranks.rank == 0:
            self.checkpoints.update(p)
        self.ranks.barrier()

    def _keep_neighbours(self, result: Result) -> None:
        """What each test query retrieved, for the report."""
        neighbours = result.retrieval.neighbours
        found = np.where(neighbours >= 0, result.gallery.ids[np.maximum(neighbours, 0)], -1)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, query=result.queries.ids, neighbours=found, average_precision=result.retrieval.average_precision,
            relevant=result.retrieval.num_relevant,
        )  # fmt: skip
        self.run.write("test_neighbours.npz", buffer.getvalue())

    def _log(self, logs: dict[str, float], clock: Clock, plan: Plan) -> None:
        if self.ranks.rank != 0 or self.tracker is None:
            return
        p = self.progress
        speed, share = p.images / max(p.seconds, 1e-9), p.waited_s / max(p.seconds, 1e-9)
        total = self.config.length.steps(len(plan))
        self._say(
            {"phase": "training", "step": p.step, "total": total, "images_per_second": speed, "waiting": share, **logs}
        )
        if p.step % self.config.runtime.log_every == 0 or p.step == 1:
            values = {"epoch": round(clock.epoch, 4), **logs, **learning_rates(self.context.optimizers)}
            self.tracker.log(p.step, "train", values | {"images_per_second": speed, "waiting": share})

    def _say(self, progress: dict[str, Any]) -> None:
        if self.ranks.rank == 0:
            self.board.publish(progress)

    def _save(self, kind: str) -> None:
        if self.ranks.rank == 0:
            plan, mining = (self.plan, self.mining) if kind == "checkpoints" else (None, None)

            def more(folder: Folder) -> None:
                if mining is not None:
                    mining.save(folder / "mining")
                if self.tracker is not None:
                    self.tracker.sync()  # before the checkpoint counts: whoever resumes from it finds its lines

            self.checkpoints.save(kind, self.progress, self.trunk, self.method, self.context.optimizers, plan, more)
            if mining is not None:
                mining.prune([self.checkpoints.folder(kind, step) for step in self.checkpoints.steps()])
        self.ranks.barrier()

    def _load_best(self) -> None:
        self.checkpoints.load("best", self.progress.best_step, self.trunk, self.method)
