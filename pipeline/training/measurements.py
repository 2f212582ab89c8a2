"""What a run measures of itself: the frozen trunk before it, the validation fold during it, the test classes at its end."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from methods import Method
from methods.config import Clock
from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.evaluate_task import EvaluationResult, evaluate
from pipeline.evaluation.tasks import RetrievalTask, test_task, validation_task
from pipeline.model.trunk import Trunk
from pipeline.runs.checkpoint import Checkpoints, TrainingState
from pipeline.runs.run_folder import NEIGHBOURS, SUMMARY, read_changes
from pipeline.runs.summary import summarise
from pipeline.runs.tracking import Tracker


class Measurements:
    """Measures a run's network; every rank makes the same calls.

    Args:
        config: of the run.
        store: the dataset.
        embedder: how images are embedded.
        trunk, method: the network.
        checkpoints: of the run, into whose folder the final figures are written.
        save: saves a checkpoint below "checkpoints" or "best".
        load_best: puts the best weights into trunk and method.
        publish: shows what is going on.
        report: called with the metrics of each validation, if given.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        embedder: Embedder,
        trunk: Trunk,
        method: Method,
        checkpoints: Checkpoints,
        *,
        save: Callable[[str], None],
        load_best: Callable[[], None],
        publish: Callable[[dict[str, Any]], None],
        report: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.config, self.store, self.embedder, self.trunk, self.method = config, store, embedder, trunk, method
        self.checkpoints, self.save, self.load_best = checkpoints, save, load_best
        self.publish, self.report = publish, report
        self.validation = validation_task(config, store)

    def frozen(self, progress: TrainingState, tracker: Tracker | None) -> None:
        """The pretrained trunk's pooled features on the test classes, so that every run shows what training added."""
        task = self._test_task()
        if task is not None:
            self.publish({"phase": "evaluating the frozen trunk"})
            result = evaluate(task, self.embedder, self.trunk, None, self.config.evaluation.recall_at)
            progress.frozen = result.metrics
            if tracker is not None:
                tracker.log(0, "frozen", result.metrics)
        else:
            progress.frozen = {"queries": 0.0}
        self.save("checkpoints")

    def validate(self, clock: Clock, progress: TrainingState, tracker: Tracker | None) -> dict[str, float] | None:
        """Metrics of the validation task, if there is one; the best weights so far are saved."""
        if self.validation is None:
            return None
        self.publish({"phase": "validating"})
        recall_at, name = self.config.evaluation.recall_at, self.config.evaluation.metric
        metrics = evaluate(self.validation, self.embedder, self.trunk, self.method, recall_at).metrics
        if tracker is not None:
            tracker.log(progress.step, "validation", {"epoch": round(clock.epoch, 4), **metrics})
        if progress.best_step < 0 or metrics[name] > progress.best_metrics[name]:
            progress.best_step, progress.best_metrics = progress.step, metrics
            self.save("best")
        if self.report is not None:
            self.report({"step": progress.step, "epoch": clock.epoch, **metrics})
        return metrics

    def final(self, progress: TrainingState, tracker: Tracker | None) -> None:
        """The figures of the run: the chosen checkpoint on the test classes, once."""
        ranks, run = self.embedder.ranks, self.checkpoints.run
        if self.config.evaluation.checkpoint == "best":
            self.load_best()
        task = self._test_task()
        metrics: dict[str, Any] = {}
        if task is not None:
            self.publish({"phase": "evaluating on the test classes"})
            e = self.config.evaluation
            result = evaluate(task, self.embedder, self.trunk, self.method, e.recall_at, e.clustering)
            metrics = result.metrics
            if ranks.rank == 0:
                self._save_neighbours(result)
        if tracker is not None:
            if metrics:
                tracker.log(progress.step, "test", metrics)
            tracker.sync()
        if ranks.rank == 0:
            run.write_json(SUMMARY, summarise(self.config, self.store, progress, metrics, read_changes(run)))
        progress.finished = True
        if ranks.rank == 0:
            self.checkpoints.update(progress)
        ranks.barrier()

    def _test_task(self) -> RetrievalTask | None:
        return test_task(self.config, self.store) if self.config.evaluation.test else None

    def _save_neighbours(self, result: EvaluationResult) -> None:
        """What each test query retrieved, for the report."""
        neighbours = result.retrieval.neighbours
        ids = np.where(neighbours >= 0, result.gallery.ids[np.maximum(neighbours, 0)], -1)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, query=result.queries.ids, neighbours=ids, average_precision=result.retrieval.average_precision,
            relevant=result.retrieval.num_relevant,
        )  # fmt: skip
        self.checkpoints.run.write(NEIGHBOURS, buffer.getvalue())
