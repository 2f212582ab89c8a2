"""Several runs as one: their embeddings of the test classes side by side, the "concatenated" figure of the Reality Check.

Each run embeds the test classes once, with the checkpoint that it reports. Every row of a run is scaled to length one, the
rows of all runs are put side by side and divided by the square root of their number, which makes them of length one again: the
cosine of two rows is the mean of the runs' cosines.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.data.store import Store
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.cpus import use_cpus
from pipeline.errors import DivergedError, UserError
from pipeline.evaluation.evaluate_task import EvaluationResult, TaskEmbeddings, embed_task, measure_embeddings
from pipeline.evaluation.tasks import RetrievalTask, test_task
from pipeline.inference.trained_model import TrainedModel, load_run
from pipeline.runs.checkpoint import Checkpoints
from pipeline.storage import Folder

_TASK = ("distance", "distractors", "reranking")  # keys of evaluation that say what a figure is


@dataclass(frozen=True)
class EnsembleMeasurement:
    """Figures of several runs and of their concatenated embeddings.

    Attributes:
        models: The runs and their checkpoints.
        own: Figures of each run alone; empty if they were not asked for.
        result: Figures of the concatenated embeddings.
        store: The dataset.
    """

    models: list[TrainedModel]
    own: list[dict[str, float]]
    result: EvaluationResult
    store: Store


def measure_ensemble(
    runs: Sequence[Folder],
    *,
    checkpoint: str | None = None,
    recall_at: Sequence[int] | None = None,
    clustering: bool | None = None,
    threads: int | None = None,
) -> dict[str, float]:
    """Figures of the runs' concatenated embeddings on the test classes, in percent, by name.

    Args:
        runs, checkpoint, recall_at, clustering, threads: As `measure_runs` takes them.

    Raises:
        UserError, DivergedError: As `measure_runs`.
    """
    return measure_runs(
        runs, checkpoint=checkpoint, recall_at=recall_at, clustering=clustering, threads=threads, own=False
    ).result.metrics


def measure_runs(
    runs: Sequence[Folder],
    *,
    checkpoint: str | None = None,
    recall_at: Sequence[int] | None = None,
    clustering: bool | None = None,
    threads: int | None = None,
    own: bool = True,
) -> EnsembleMeasurement:
    """Measures several runs together, and each alone, in one pass over the images for each run.

    Memory: N x D x 8 bytes for N images and D dimensions of all runs together, and half of that again; one network at a time.

    Args:
        runs: Their folders; finished runs with the same dataset, distance, distractors and re-ranking.
        checkpoint: Of every run: "best", "last" or a step; None: the run's `evaluation.checkpoint`.
        recall_at: Every K of Recall@K; None: those of all runs.
        clustering: Measure NMI and AMI as well; None: as the runs do.
        threads: Threads of this process; None: all cores.
        own: Measure each run alone as well.

    Raises:
        UserError: A run is not finished, or the runs cannot be measured together.
        DivergedError: Embeddings cannot be measured.
    """
    models = [load_run(run.uri, checkpoint) for run in runs]
    _check(models)
    configs = [model.config.evaluation for model in models]
    ks = tuple(recall_at or dict.fromkeys(k for config in configs for k in config.recall_at))
    cluster = all(config.clustering for config in configs) if clustering is None else clustering
    use_cpus(threads or os.cpu_count() or 1)
    store = models[0].store()
    task = test_task(models[0].config, store)
    if task is None:
        raise UserError(f"the runs have no test images to evaluate in {store.folder}")
    embedded: TaskEmbeddings | None = None
    parts, figures = [], []
    for model in models:
        embedded = _embed(model, model.store(), task)
        if own:
            figures.append(measure_embeddings(task, embedded, Ranks(), ks, cluster).metrics)
        parts.append(embedded.rows.cpu())
    assert embedded is not None
    whole = dataclasses.replace(
        embedded,
        rows=concatenated(parts),
        query_rows=embedded.query_rows.cpu(),
        gallery_rows=embedded.gallery_rows.cpu(),
    )
    return EnsembleMeasurement(models, figures, measure_embeddings(task, whole, Ranks(), ks, cluster), store)


def concatenated(parts: list[Tensor]) -> Tensor:
    """Embeddings [N, D_1], [N, D_2], ... as float64 [N, D_1 + D_2 + ...], each of length one; empties the list.

    Raises:
        DivergedError: A row is zero or not finite, and has no direction.
    """
    out = torch.empty(len(parts[0]), sum(part.shape[1] for part in parts), dtype=torch.float64)
    start, num = 0, len(parts)
    while parts:
        part = parts.pop(0).double()
        lengths = part.norm(dim=1, keepdim=True)
        bad = int((~((lengths > 0) & lengths.isfinite())).sum())
        if bad:
            raise DivergedError(
                f"the embeddings cannot be measured: {bad} of {len(part)} rows of run {num - len(parts)} are zero or not finite"
            )
        out[:, start : start + part.shape[1]] = part / (lengths * math.sqrt(num))
        start += part.shape[1]
    return out


def _embed(model: TrainedModel, store: Store, task: RetrievalTask) -> TaskEmbeddings:
    gpu = torch.cuda.is_available() and model.config.runtime.gpus_per_worker
    embedder, trunk, method = model.load(store, torch.device("cuda" if gpu else "cpu"))
    try:
        return embed_task(task, embedder, trunk, method)
    except ValueError as error:
        raise DivergedError(f"the embeddings of {model.run} cannot be measured: {error}") from error


def _check(models: Sequence[TrainedModel]) -> None:
    """Raises UserError unless all runs are finished and their figures are of the same thing."""
    if not models:
        raise UserError("got no runs, expected one or more")
    for model in models:
        latest = Checkpoints(model.run).latest()
        if latest is None or not latest.finished:
            raise UserError(
                f"run {model.run} is not finished: its test classes are not measured yet; train it to its end"
            )
    first = models[0]
    for model in models[1:]:
        if model.fingerprint != first.fingerprint:
            raise UserError(
                f"{model.run} and {first.run} are of different datasets ({model.fingerprint}, {first.fingerprint}): only runs "
                "of the same dataset can be measured together"
            )
        for key in _TASK:
            values: list[Any] = [getattr(m.config.evaluation, key) for m in (model, first)]
            if values[0] != values[1]:
                raise UserError(
                    f"evaluation.{key} of {model.run} is {values[0]}, of {first.run} {values[1]}: only runs that are measured "
                    "alike can be measured together"
                )
