"""Evaluations of a run: the frozen trunk before training, the validation fold during it, the test classes at the end."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from methods import Method
from methods.config import Clock
from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.evaluation.compact import measure_dims
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.evaluate_task import EvaluationResult, evaluate
from pipeline.evaluation.tasks import RetrievalTask, test_task, validation_task
from pipeline.exploration.embedding_sample import draw_sample
from pipeline.metric_names import COUNTS
from pipeline.model.trunk import Trunk
from pipeline.runs.checkpoint import Checkpoints, TrainingState
from pipeline.runs.run_folder import EMBEDDINGS, NEIGHBOURS, SUMMARY, read_changes
from pipeline.runs.summary import summarise
from pipeline.runs.tracking import Tracker
from pipeline.training.frozen_figures import frozen_figures
from pipeline.training.weight_average import WeightAverage


class Measurements:
    """Evaluates a run's network; every rank makes the same calls.

    Args:
        config: The resolved configuration of the run.
        store: The dataset.
        embedder: The embedder of the images.
        trunk, method: The network.
        checkpoints: The checkpoints of the run, into whose folder the final metrics are written.
        save: Saves a checkpoint below "checkpoints" or "best".
        load_best: Loads the best weights into trunk and method.
        publish: Publishes the present phase.
        say: Shows a line to the user.
        tell: Tells the driver the metrics of a validation, with step, epoch and images.
        report: Called with the metrics of each validation, if given.
        average: The average of weights that is evaluated instead of the newest ones, if given.
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
        say: Callable[[str], None],
        tell: Callable[[dict[str, Any]], None],
        report: Callable[[dict[str, Any]], None] | None,
        average: WeightAverage | None = None,
    ) -> None:
        self.config = config
        self.store = store
        self.embedder = embedder
        self.trunk = trunk
        self.method = method
        self.checkpoints = checkpoints
        self.save = save
        self.load_best = load_best
        self.publish = publish
        self.say = say
        self.tell = tell
        self.report = report
        self.average = average
        self.validation = validation_task(config, store)

    def frozen(self, progress: TrainingState, tracker: Tracker | None) -> None:
        """Evaluates the pretrained trunk's pooled features on the test classes, the reference for the gain of training.

        And on the validation task, which may not become worse by training.
        """
        task = self._test_task()
        if task is not None:
            progress.frozen = self._frozen_metrics(task, None)
            if tracker is not None:
                tracker.log(0, "frozen", progress.frozen)
        else:
            progress.frozen = {"queries": 0.0}
        if self.validation is not None and self.config.validates:
            fold = self.config.data.validation_fold
            same = self.config.protocol == "paper" and task is not None
            progress.frozen_validation = progress.frozen if same else self._frozen_metrics(self.validation, fold)
        self.save("checkpoints")

    def _frozen_metrics(self, task: RetrievalTask, fold: int | None) -> dict[str, float]:
        """The figures of an earlier run with the same network and images, or computed and kept for later ones."""
        ranks = self.embedder.ranks
        shared = frozen_figures(self.config, self.store, self.embedder, self.trunk, fold) if ranks.rank == 0 else None
        kept, line = shared.read() if shared else (None, "")
        if line:
            self.say(line)
        metrics: dict[str, float] | None = ranks.broadcast(kept)
        if metrics is None:
            self.publish({"phase": "evaluating the frozen trunk"})
            metrics = evaluate(task, self.embedder, self.trunk, None, self.config.evaluation.recall_at).metrics
            if shared and (line := shared.write(metrics)):
                self.say(line)
        return metrics

    def validate(self, clock: Clock, progress: TrainingState, tracker: Tracker | None) -> dict[str, float] | None:
        """Evaluates the validation task, if there is one, and saves the weights if they are the best so far."""
        if self.validation is None:
            return None
        self.publish({"phase": "validating"})
        recall_at = self.config.evaluation.recall_at
        name = self.config.evaluation.metric
        position = {"epoch": round(clock.epoch, 4), "images": progress.images}
        started = time.perf_counter()
        with self._evaluated():
            metrics = evaluate(self.validation, self.embedder, self.trunk, self.method, recall_at).metrics
        progress.validation_s += time.perf_counter() - started
        if tracker is not None:
            tracker.log(progress.step, "validation", {**position, **metrics})
        is_best = progress.best_step < 0 or metrics[name] > progress.best_metrics[name]
        if self.embedder.ranks.rank == 0:
            self.say(_validation_line(progress.step, clock.epoch, metrics, name, is_best))
            before = progress.frozen_validation.get(name)
            if before is not None and progress.best_step < 0 and round(metrics[name], 2) < round(before, 2):
                self.say(
                    f"warning: {name} on the validation classes is {metrics[name]:.2f}, below the {before:.2f} of the backbone before "
                    "training: if it stays so, try a lower method.optimizer.lr, a longer model.head_first, or model.trainable: last 2 blocks"
                )
        if is_best:
            progress.best_step = progress.step
            progress.best_metrics = metrics
            self.save("best")
        if self.embedder.ranks.rank == 0:
            self.tell({"step": progress.step, **position, **metrics})
        if self.report is not None:
            self.report({"step": progress.step, "epoch": clock.epoch, **metrics})
        return metrics

    def final(self, progress: TrainingState, tracker: Tracker | None) -> None:
        """Evaluates the selected checkpoint on the test classes and writes the summary; once per run."""
        ranks, run = self.embedder.ranks, self.checkpoints.run
        if self.config.evaluation.checkpoint == "best":
            self.load_best()
        task = self._test_task()
        metrics: dict[str, Any] = {}
        by_dim: dict[int, dict[str, float]] = {}
        if task is not None:
            self.publish({"phase": "evaluating on the test classes"})
            evaluation = self.config.evaluation
            loaded = evaluation.checkpoint == "best"  # an average itself, where there is one
            with contextlib.nullcontext() if loaded else self._evaluated():
                result = evaluate(
                    task, self.embedder, self.trunk, self.method, evaluation.recall_at, evaluation.clustering
                )
            metrics = result.metrics
            if nested := self.config.method.nested_dims:
                rows = measure_dims(task, result.embedded, ranks, nested, evaluation.recall_at)
                by_dim = {row.dim: row.metrics for row in rows}
            if ranks.rank == 0:
                self._save_for_report(result, task)
        if tracker is not None:
            if metrics:
                tracker.log(progress.step, "test", metrics)
            tracker.sync()
        if ranks.rank == 0:
            summary = summarise(
                self.config, self.store, progress, metrics, read_changes(run), by_dim, self.method.skipped_steps
            )
            run.write_json(SUMMARY, summary)
        progress.finished = True
        if ranks.rank == 0:
            self.checkpoints.update(progress)
        ranks.barrier()

    def _evaluated(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the network has the weights that are evaluated."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def _test_task(self) -> RetrievalTask | None:
        return test_task(self.config, self.store) if self.config.evaluation.test else None

    def _save_for_report(self, result: EvaluationResult, task: RetrievalTask) -> None:
        """Writes the neighbours of each test query, and embeddings of the test images, for the report."""
        run = self.checkpoints.run
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **result.neighbour_columns())  # type: ignore[arg-type]
        run.write(NEIGHBOURS, buffer.getvalue())
        ids, labels, embeddings = result.embedded.each_once()
        run.write(EMBEDDINGS, draw_sample(ids, labels, embeddings, task.distance).to_bytes())


def _validation_line(step: int, epoch: float, metrics: dict[str, float], chooses: str, is_best: bool) -> str:
    """One line of a validation's result: first the metric that chooses the best checkpoint."""
    names = [chooses, *(name for name in metrics if name != chooses and name not in COUNTS)]
    values = ", ".join(f"{name} {metrics[name]:.2f}" for name in names)
    return f"validation at step {step:,} (epoch {epoch:.2f}): {values}{'  * best so far' if is_best else ''}"
