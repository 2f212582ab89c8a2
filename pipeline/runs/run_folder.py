"""The folder of a run: its path, and the names of its files.

config.yaml                 the resolved configuration
run.json                    folder and fingerprint of the dataset
class_names.json            names of the training classes, by label
changes.jsonl               changes of runtime keys between starts
incarnation                 number of the newest start of the workers
state.json, stop.json       whether it runs, and the request to stop it, see `run_state`
checkpoints/, best/         step-00000077/ each, see `checkpoint`
metrics.jsonl, tensorboard/ losses and metrics by step
summary.json                the final figures
tracking.json               the run with the services that track it, see `pipeline.trackers`
test_neighbours.npz         the neighbours of each test query
test_embeddings.npz         embeddings of the test images, or of a sample of them
report.html                 the report
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.errors import UserError, joined_lines
from pipeline.storage import Folder

if TYPE_CHECKING:  # the config imports the methods and with them PyTorch: nothing that names files needs that
    from pipeline.config import Config

CONFIG = "config.yaml"
DATASET = "run.json"
CLASS_NAMES = "class_names.json"
CHANGES = "changes.jsonl"
INCARNATION = "incarnation"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
TRACKING = "tracking.json"
NEIGHBOURS = "test_neighbours.npz"
EMBEDDINGS = "test_embeddings.npz"
REPORT = "report.html"
CHECKPOINT = "checkpoint.json"  # in the folder of a checkpoint; written last


def run_folder(config: Config) -> Folder:
    """Folder of the run that is configured."""
    return Folder(config.root) / "runs" / config.name


def read_values(run: Folder) -> dict[str, Any]:
    """The values of a run's config.yaml as they are there.

    Raises:
        UserError: It is not YAML, or not the configuration of a run.
    """
    try:
        values = yaml.safe_load(run.read(CONFIG))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{run}/{CONFIG} is damaged ({joined_lines(error)}): restore it") from error
    if not isinstance(values, dict) or "evaluation" not in values:
        raise UserError(f"{run}/{CONFIG} is not the config of a run: restore it, or remove the folder")
    return values


def read_config(run: Folder) -> Config:
    """The configuration that a run was started with; keys that did not exist then have their defaults.

    Raises:
        UserError: config.yaml has a key or value that this version does not accept.
    """
    from pipeline.config import build_config

    try:
        return build_config(read_values(run))
    except UserError as error:
        raise UserError(
            f"run {run} was started by another version, this one does not accept its config.yaml ({error}): use that "
            "version, or train again with another --set name=... or --fresh"
        ) from None


def checkpoint_folder(kind: str, step: int) -> str:
    """Path of a checkpoint below the run folder; `kind` is "checkpoints" or "best"."""
    return f"{kind}/step-{step:08d}"


def step_of(name: str) -> int | None:
    """Step of a checkpoint from its folder's name; None for other names."""
    return int(name[5:]) if re.fullmatch(r"step-\d+", name) else None


def read_changes(run: Folder) -> list[dict[str, Any]]:
    """Changes of runtime keys between starts of a run: {"step": ..., "changes": ["key: old -> new", ...]}.

    Population-based training changes other keys too; such a line has "copied_from_trial".
    """
    text = run.read(CHANGES).decode() if run.exists(CHANGES) else ""
    return [json.loads(line) for line in text.splitlines()]
