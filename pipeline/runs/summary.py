"""The result of a run: the content of summary.json, and the protocol of its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from methods.config import Length
from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.runs.checkpoint import TrainingState

# A resumed run in which one of these changed is not the run that a fresh start would repeat.
RESULT_KEYS = (
    "length",
    "runtime.workers",
    "runtime.cpus_per_worker",
    "runtime.gpus_per_worker",
    "runtime.deterministic",
)


def protocol(config: Config, store: Store) -> dict[str, Any]:
    """The conditions under which the figures were measured."""
    transforms = config.data.transforms.of_evaluation()
    size = transforms.size
    pixels = f"squash to {size}" if transforms.squash else f"resize {transforms.resize or size}, centre crop {size}"
    fold = config.data.validation_fold
    mining = config.mining
    checkpoint: str = config.evaluation.checkpoint
    if checkpoint == "best":
        fair = "validation fold of the training classes" if config.validates else "no choice made"
        classes = "TEST classes" if config.protocol == "paper" else fair
        checkpoint += f" by {config.evaluation.metric} on the {classes}"
    return {
        "profile": config.protocol,
        "dataset": store.title,
        **({"partial": "; ".join(store.partial)} if store.partial else {}),
        "classes": "disjoint: test classes are never trained on",
        "trained_on": "all training classes" if fold is None else f"training classes without fold {fold}",
        "checkpoint": checkpoint,
        "method": config.method.name,
        "backbone": config.model.backbone,
        "weights": config.model.weights,
        "pooling": config.model.pooling,
        "batch_norm": config.model.batch_norm,
        "embedding_dim": config.method.embedding_dim,
        "test_pixels": pixels
        if size == config.data.transforms.size
        else f"{pixels} (trained at {config.data.transforms.size})",
        **({"distance": config.evaluation.distance} if config.evaluation.distance != "cosine" else {}),
        "batch": f"{config.method.classes_per_batch} x {config.method.samples_per_class}",
        "length": str(config.length),
        "precision": config.precision,
        "seed": config.seed,
        **({"mining": f"{mining.engine}, {mining.consistency}"} if config.method.mining is not None else {}),
    }


def summarise(
    config: Config,
    store: Store,
    progress: TrainingState,
    metrics: dict[str, float],
    changes: Sequence[dict[str, Any]],
    by_dim: Mapping[int, dict[str, float]] | None = None,
    skipped: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The content of summary.json; metrics in percent, `seconds` spent in training steps, `validation_seconds` beside them.

    `by_dim`: the metrics by number of dimensions kept, if the run trained nested ones. `skipped`: numbers of steps that changed no
    weight, by the method's reason.
    """
    changed_keys = {change.split(":")[0] for line in changes for change in line["changes"]}
    copied = {change.split(":")[0] for line in changes if "copied_from_trial" in line for change in line["changes"]}
    affecting = sorted((changed_keys & set(RESULT_KEYS)) | copied)
    asynchronous = config.method.mining is not None and config.mining.consistency == "async"
    return {
        "name": config.name,
        "frozen": _rounded(progress.frozen),
        **({"frozen_validation": _rounded(progress.frozen_validation)} if progress.frozen_validation else {}),
        "final": _rounded(metrics),
        **({"by_dim": {str(dim): _rounded(found) for dim, found in by_dim.items()}} if by_dim else {}),
        "validation": _rounded(progress.best_metrics),
        "metric": config.evaluation.metric,
        "step": progress.step,
        "images": progress.images,
        "skipped_steps": progress.skipped_steps,
        **({"skipped": {reason: n for reason, n in skipped.items() if n}} if skipped and any(skipped.values()) else {}),
        "seconds": round(progress.seconds, 2),
        "validation_seconds": round(progress.validation_s, 2),
        "images_per_second": round(progress.images / max(progress.seconds, 1e-9), 2),
        "waiting_for_data": round(progress.waited_s / max(progress.seconds, 1e-9), 4),
        "protocol": protocol(config, store),
        "reproducible": config.runtime.deterministic and not affecting and not asynchronous,
        "changed_while_running": affecting,
    }


def warnings(summary: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a run as a whole, a line each: most steps changed no weight, or training made the network worse."""
    yield from filter(None, (_skipped_line(summary), _worse_line(summary)))


def _worse_line(summary: Mapping[str, Any]) -> str | None:
    """A warning, if the trained network is below the backbone before training: on the test classes, else in its best validation."""
    name = summary.get("metric", "")  # absent in runs of earlier versions, as are the figures of the backbone on a fold
    for what, before, after in (
        ("on the test classes", summary["frozen"], summary["final"]),
        ("in the best validation", summary.get("frozen_validation", {}), summary["validation"]),
    ):
        if name in before and name in after and round(after[name], 2) < round(before[name], 2):
            return f"warning: training made it worse: {name} is {after[name]:.2f} {what}, {before[name]:.2f} of the backbone before training"
    return None


def _skipped_line(summary: Mapping[str, Any]) -> str | None:
    """A warning, if most steps of a run changed no weight: how many, and why."""
    reasons = dict(summary.get("skipped", {}))
    if summary.get("skipped_steps"):  # absent in runs of earlier versions
        reasons["loss or gradient was not finite"] = summary["skipped_steps"]
    total = sum(reasons.values())
    if total <= summary["step"] / 2:
        return None
    why = "; ".join(f"{n:,} times {reason}" for reason, n in sorted(reasons.items(), key=lambda item: -item[1]))
    what = "nothing was trained" if total >= summary["step"] else "most of the run trained nothing"
    return f"warning: {total:,} of {summary['step']:,} steps changed no weight, {what}: {why}"


def finished_length(summary: Mapping[str, Any]) -> Length:
    """The length of the run that a summary.json is about."""
    return Length.model_validate(summary["protocol"]["length"])


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in metrics.items()}
