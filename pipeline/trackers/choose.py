"""The trackers that a config names: made, and checked before anything starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from methods import plugins
from pipeline.config import Config
from pipeline.config_runtime import TrackerConfig
from pipeline.errors import UserError
from pipeline.storage import Folder
from pipeline.trackers import mlflow_tracker, wandb_tracker
from pipeline.trackers.mlflow_tracker import MlflowTracker
from pipeline.trackers.tracker import Tracker
from pipeline.trackers.wandb_tracker import WandbTracker

ARGUMENTS = {"wandb": wandb_tracker.ARGUMENTS, "mlflow": mlflow_tracker.ARGUMENTS}


def make_trackers(config: Config) -> dict[str, Tracker]:
    """A tracker for each entry of the config, by name.

    Raises:
        UserError: One cannot be made.
    """
    found: dict[str, Tracker] = {}
    for entry in config.tracking:
        if entry.name in found:
            raise UserError(f"tracking names {entry.name} twice: leave one of them out")
        found[entry.name] = _make(entry, config.root)
    return found


def check_trackers(config: Config) -> None:
    """Checks packages, arguments, credentials and stores; nothing is sent.

    Raises:
        UserError: A tracker could not do its work.
    """
    for tracker in make_trackers(config).values():
        if isinstance(tracker, (WandbTracker, MlflowTracker)):
            tracker.check(Folder(config.root).is_local)


def _make(entry: TrackerConfig, storage: str) -> Tracker:
    arguments: Mapping[str, Any] = entry.args
    if entry.name in ARGUMENTS:
        unknown = sorted(set(arguments) - set(ARGUMENTS[entry.name]))
        if unknown:
            raise UserError(
                f"tracking: {entry.name} has no argument {unknown[0]!r}: expected {', '.join(ARGUMENTS[entry.name])}"
            )
        if importlib.util.find_spec(entry.name) is None:
            raise UserError(f"tracking: {entry.name} is not installed: pip install 'raydml[{entry.name}]'")
        return WandbTracker(**arguments) if entry.name == "wandb" else MlflowTracker(storage, **arguments)
    try:
        made = plugins.load(entry.name, "tracker")(**arguments)
    except ValueError as error:
        raise UserError(f"tracking: {error}") from error
    except Exception as error:  # whatever a user's class raises
        raise UserError(f"tracking: {entry.name} cannot be made: {plugins.failure(error)}") from error
    if not isinstance(made, Tracker):
        raise UserError(
            f"tracking: {entry.name} makes a {type(made).__name__}, expected the methods start, log and finish of "
            "pipeline.trackers.tracker.Tracker"
        )
    return made
