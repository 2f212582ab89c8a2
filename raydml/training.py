"""`raydml.train`: a run, as `python -m pipeline.train` makes it, and its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import NameTakenError, UserError
from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.inference.load_model import load_model
from pipeline.recipes import assigned, parse_keys, read_recipe, resolve
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import REPORT, SUMMARY, run_folder
from pipeline.storage import Folder
from pipeline.training.start import located, run


@dataclass(frozen=True)
class TrainingResult:
    """A run after `train` has returned.

    Attributes:
        name: Name of the run.
        folder: Its folder, a path or URI.
        finished: It has reached its length; otherwise a signal has stopped it, and the same call continues it.
        step: Steps done.
        metrics: Final figures on the test classes, percent, by name ("recall@1", "map@r", ...); empty if not measured.
        frozen: The same of the untrained network.
        validation: The best validation; empty if there was none.
        summary: The content of the run's summary.json.
        report: Path or URI of the report; None if the run has not finished.
    """

    name: str
    folder: str
    finished: bool
    step: int
    metrics: dict[str, float]
    frozen: dict[str, float]
    validation: dict[str, float]
    summary: dict[str, Any]
    report: str | None

    def model(self, checkpoint: str | int | None = None, device: str | None = None) -> EmbeddingModel:
        """The trained model, as `raydml.load` gives it."""
        return load_model(self.folder, checkpoint, device)


def train(recipe: str | None = None, *, fresh: bool = False, **overrides: Any) -> TrainingResult:
    """Trains a run to its end, or continues it; a finished run of the same settings is not trained again.

    Args:
        recipe: YAML file or name of a preset; None: the built-in demo.
        fresh: Remove an earlier run of this name and start over.
        overrides: Keys of the recipe: `length="2 epochs"`, sections as mappings, `method={"embedding_dim": 64}`, or by
            their dotted names, `**{"data.transforms.size": 64}`.

    Raises:
        UserError: One line a problem of the recipe, the dataset or the machine.
        RunError: The run failed; its newest checkpoint is kept.
    """
    values = assigned(read_recipe(recipe), _assignments(overrides))
    config = resolve(values, recipe)
    try:
        run(config, fresh)
    except NameTakenError as error:
        raise UserError(f"{error}; as a run of its own: name={error.free_name!r}") from None
    return _result(run_folder(located(config)))


def _assignments(overrides: Mapping[str, Any], above: tuple[str, ...] = ()) -> list[tuple[list[str], Any]]:
    """Parts of each dotted key and its value; of a section, those of its keys."""
    out: list[tuple[list[str], Any]] = []
    for key, value in overrides.items():
        keys = (*above, *parse_keys(key))
        if isinstance(value, Mapping) and value:
            out += _assignments(value, keys)
        else:
            out.append((list(keys), value))
    return out


def _result(folder: Folder) -> TrainingResult:
    latest = Checkpoints(folder).latest()
    finished = latest is not None and latest.finished and folder.exists(SUMMARY)
    summary = folder.read_json(SUMMARY) if finished else {}
    return TrainingResult(
        folder.uri.rsplit("/", 1)[1],
        folder.uri,
        finished,
        latest.step if latest else 0,
        summary.get("final", {}),
        summary.get("frozen", {}),
        summary.get("validation", {}),
        summary,
        f"{folder}/{REPORT}" if finished and folder.exists(REPORT) else None,
    )
