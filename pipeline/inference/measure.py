"""A checkpoint of a run, measured: on its own dataset or on another one, with what the figures are of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from pipeline.config import Config
from pipeline.data.entries import SPLITS
from pipeline.data.find_store import find_store
from pipeline.data.store import Store
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.cpus import use_cpus
from pipeline.errors import UserError
from pipeline.evaluation.compact import OVERSAMPLE, CompactRow, Precision, check_dims, measure_compact, measure_dims
from pipeline.evaluation.evaluate_task import EvaluationResult, evaluate
from pipeline.evaluation.tasks import RetrievalTask, all_task, test_task, validation_task
from pipeline.inference.trained_model import TrainedModel, load_run
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.summary import protocol
from pipeline.storage import home

Split = Literal["test", "validation", "train", "all"]

_PROTOCOL = ("profile", "trained_on", "checkpoint", "backbone", "weights", "embedding_dim", "test_pixels", "seed")


@dataclass(frozen=True)
class Measurement:
    """A checkpoint's figures and what they are of.

    Attributes:
        result: The figures.
        embeddings: Embeddings of the query images, if they were asked for.
        query_labels: Classes of the query images.
        title: What was measured: images, dataset, checkpoint.
        notes: What a reader of the figures has to know, one line each.
        protocol: The conditions, one line.
        partial: A sentence for each thing that the dataset lacks.
        trained, store: The checkpoint and the dataset.
        split, distance: Which images, and what nearest means.
        compact: Figures by dimensions and precision, if they were asked for or the run trained nested dimensions.
    """

    result: EvaluationResult
    embeddings: torch.Tensor | None
    query_labels: np.ndarray
    title: str
    notes: tuple[str, ...]
    protocol: str
    partial: tuple[str, ...]
    trained: TrainedModel
    store: Store
    split: Split
    distance: Literal["cosine", "euclidean"]
    compact: tuple[CompactRow, ...] = ()


def measure(
    name: str,
    checkpoint: str | None = None,
    split: Split | None = None,
    *,
    data: str | None = None,
    distance: Literal["cosine", "euclidean"] | None = None,
    recall_at: Sequence[int] | None = None,
    clustering: bool = False,
    embeddings: bool = False,
    dims: Sequence[int] | None = None,
    quantise: Sequence[Precision] = (),
    oversample: int | None = None,
) -> Measurement:
    """Measures a checkpoint of a run.

    Args:
        name: The run, as `load_run` takes it.
        checkpoint: As `load_run` takes it.
        split: Test or validation classes, or all images of the training split or of all splits, each searched among the
            others; None: the test classes if the run is finished or `data` is given, else the validation fold.
        data: Name, folder or URI of another dataset, whose images are measured.
        distance: None: the run's.
        recall_at: None: the run's.
        clustering: Measure NMI and AMI as well.
        embeddings: Return the embeddings of the queries as well.
        dims: Measure these first dimensions of the embeddings as well; None: those that the run's method trained.
        quantise: Measure int8 or binary embeddings as well.
        oversample: As `measure_compact` takes it; None: its default.

    Raises:
        UserError: There is no such run, checkpoint or dataset, or it has no such images; embeddings do not have these
            dimensions, or cannot be compared so.
        RunError: The embeddings cannot be measured.
    """
    trained = load_run(name, checkpoint)
    config = trained.config
    if distance is not None:
        evaluation = type(config.evaluation).model_validate(config.evaluation.model_dump() | {"distance": distance})
        config = config.model_copy(update={"evaluation": evaluation})
    latest = Checkpoints(trained.run).latest()
    notes = []
    if split is None and data is None and latest is not None and not latest.finished:
        split = "validation"
        if not config.validates:
            raise UserError(
                f"run {trained.run} is not finished and has no validation fold: --split test measures its test classes"
            )
        notes.append(
            "the run is not finished: its validation classes are measured; --split test measures the test classes"
        )
    store = trained.store() if data is None else Store(find_store(data, list(dict.fromkeys((config.root, home())))))
    if data is not None and store.fingerprint != trained.fingerprint:
        notes.append(
            "another dataset than the run's: whether the run was trained on some of these classes is not known"
        )
    split = split or "test"
    task, what = _task(config, store, split)
    if quantise and task.reid:
        raise UserError(
            "int8 and binary embeddings are measured for retrieval, not for re-identification: leave out --quantise"
        )
    check_dims(dims or (), config.method.embedding_dim)
    gpu = torch.cuda.is_available() and config.runtime.gpus_per_worker
    use_cpus(os.cpu_count() or 1)
    embedder, trunk, method = trained.load(store, torch.device("cuda" if gpu else "cpu"))
    queries = embedder(task.queries.ids, trunk, method) if embeddings else None
    result = evaluate(task, embedder, trunk, method, recall_at or config.evaluation.recall_at, clustering)
    if task.distance == "euclidean" and result.unit_length:
        notes.append("all embeddings have length one: Euclidean distance ranks them as cosine does")
    return Measurement(
        result, queries, task.queries.labels, f"{what} of {store.title}, {trained.title}", tuple(notes), _protocol(config, store, trained),
        tuple(store.partial), trained, store, split, task.distance,
        _compact(task, result, config, dims, quantise, oversample),
    )  # fmt: skip


def _compact(
    task: RetrievalTask, result: EvaluationResult, config: Config, dims: Sequence[int] | None,
    quantise: Sequence[Precision], oversample: int | None,
) -> tuple[CompactRow, ...]:  # fmt: skip
    """Figures by dimensions and precision; empty if there is nothing to compare."""
    dims = config.method.nested_dims if dims is None else dims
    recall_at = [int(key.partition("@")[2]) for key in result.metrics if key.startswith(("recall@", "cmc@"))]
    embedded = result.embedded
    if not quantise:
        return tuple(measure_dims(task, embedded, Ranks(), dims, recall_at)) if dims else ()
    gallery = None if task.gallery is None else embedded.rows[embedded.gallery_rows]
    return tuple(
        measure_compact(
            embedded.rows[embedded.query_rows], torch.from_numpy(embedded.queries.labels), gallery,
            None if gallery is None else torch.from_numpy(embedded.gallery.labels), dims=dims, quantise=quantise,
            recall_at=recall_at, distance=task.distance, oversample=oversample or OVERSAMPLE,
        )
    )  # fmt: skip


def _task(config: Config, store: Store, split: Split) -> tuple[RetrievalTask, str]:
    """The task, and what is measured in words."""
    if split == "test":
        task, what = test_task(config, store), "test classes"
    elif split == "train":
        task, what = all_task(config, store, ["train"]), "training classes, each image searched among the others,"
    elif split == "all":
        task, what = all_task(config, store, SPLITS), "all classes, each image searched among the others,"
    else:
        task = validation_task(config, store)
        what = f"validation fold {config.data.validation_fold} of the training classes"
        if config.protocol == "paper":
            what = "test classes (which the paper protocol chooses on)"
    if task is None:
        raise UserError(f"the run has no {split} images to evaluate in {store.folder}")
    return task, what


def _protocol(config: Config, store: Store, trained: TrainedModel) -> str:
    values: dict[str, Any] = protocol(config, store)
    if trained.kind != "best":
        values["checkpoint"] = f"step {trained.step}"
    parts = [f"{key} {values[key]}" for key in _PROTOCOL]
    return ", ".join([*parts, f"distance {config.evaluation.distance}"])
