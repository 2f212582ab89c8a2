"""Rows of the checks that a run makes of itself before it starts, by the same functions: machine, run, network, dataset."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.config import Config
from pipeline.console import counted
from pipeline.data import own_images
from pipeline.data.store import Store
from pipeline.diagnosis.rows import Row, graded
from pipeline.distributed.ray_session import check_token, on_cluster
from pipeline.errors import RunError, UserError, one_line
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import run_folder
from pipeline.trackers.choose import check_trackers
from pipeline.training.checks import (
    check_dataset,
    check_machine,
    check_run,
    checked_trunk,
    runtime_changes,
    with_former_defaults,
)
from pipeline.training.start import open_dataset, uses_ray


@dataclass
class CheckedRecipe:
    """What the checks of a recipe have found.

    Attributes:
        rows: A row each.
        store: The dataset; None: not prepared yet, or refused.
    """

    rows: list[Row] = field(default_factory=list)
    store: Store | None = None


def check_recipe(config: Config) -> CheckedRecipe:
    """Makes a run's own checks; an error of one is its row, and the others are made all the same."""
    checked = CheckedRecipe()
    rows = checked.rows

    def attempt(check: str, found: str, expected: str, make: Callable[[], Row]) -> None:
        try:
            rows.append(make())
        except (UserError, RunError) as error:
            rows.append(Row(check, "fails", found, expected, one_line(error)))

    runtime, data = config.runtime, config.data
    number = (
        f"{runtime.min_workers} to {runtime.max_workers} workers"
        if runtime.min_workers < runtime.max_workers
        else counted(runtime.max_workers, "worker")
    )
    asked = (
        f"{number}, {counted(runtime.cpus_per_worker or 1, 'CPU')} and {counted(runtime.gpus_per_worker, 'GPU')} each"
    )
    attempt("machine", asked, "what this machine has", lambda: _machine(config, asked))
    if uses_ray(config) and not on_cluster():
        attempt("home folder", "~/.ray", "a folder for the token of Ray", _home)
    attempt("run", config.name, "a new name, or a run of the same settings", lambda: _run(config))
    if config.tracking:
        attempt(
            "tracking",
            ", ".join(entry.name for entry in config.tracking),
            "trackers that can work",
            lambda: _trackers(config),
        )
    name = f"{config.model.backbone}, weights {config.model.weights}"
    attempt("network", name, "a backbone whose weights are there", lambda: _network(config, name))
    attempt("dataset", data.source, "a prepared dataset", lambda: _dataset(config, checked))
    if checked.store is not None:
        store = checked.store
        batch = f"{config.method.classes_per_batch} classes × {config.method.samples_per_class} images"
        attempt("recipe", batch, "a batch that the dataset can give", lambda: _plan(config, store, batch))
        attempt("dataset of the run", store.title, "that of the run's start", lambda: _same_dataset(config, store))
    return checked


def _machine(config: Config, asked: str) -> Row:
    warnings = check_machine(config)
    return graded("machine", asked, "what this machine has", warning="; ".join(warnings))


def _home() -> Row:
    check_token()
    return Row("home folder", "ok", os.path.expanduser("~"), "a folder for the token of Ray")


def _trackers(config: Config) -> Row:
    check_trackers(config)
    return Row("tracking", "ok", ", ".join(entry.name for entry in config.tracking), "trackers that can work")


def _run(config: Config) -> Row:
    folder = run_folder(config)
    changes = runtime_changes(with_former_defaults(config, folder), folder)
    latest = Checkpoints(folder).latest()
    state = "a new run" if latest is None else f"continues at step {latest.step}"
    found = f"{folder}: {state}" + (f", changed: {'; '.join(changes)}" if changes else "")
    return Row("run", "ok", found, "a new name, or a run of the same settings")


def _network(config: Config, name: str) -> Row:
    trunk = checked_trunk(config)
    parameters = sum(p.numel() for p in trunk.parameters())
    found = f"{name}: {parameters / 1e6:.1f} million parameters, {trunk.features} features"
    return Row(
        "network",
        "ok",
        found + (f" ({trunk.weights_note})" if trunk.weights_note else ""),
        "a backbone whose weights are there",
    )


def _dataset(config: Config, checked: CheckedRecipe) -> Row:
    checked.store = open_dataset(config)
    if checked.store is None:
        drawings = own_images.emoji()  # raises where their package is missing
        found = f"{config.data.source}: {len(drawings):,} drawings, prepared when the run starts"
        return Row("dataset", "ok", found, "a prepared dataset")
    splits = checked.store.manifest["splits"]
    counts = "; ".join(
        f"{name} " + ", ".join(f"{n:,} {what}" for what, n in split.items()) for name, split in splits.items()
    )
    return Row("dataset", "ok", f"{checked.store.title}: {counts}", "a prepared dataset")


def _plan(config: Config, store: Store, batch: str) -> Row:
    found = check_run(config, store)
    shape = found.epoch_shape
    text = f"{batch}; length {config.length}"
    if shape is not None:
        steps = config.length.steps(shape[0])
        text += f": {steps:,} steps of {shape[1]} images, {steps * shape[1]:,} images"
    return Row("recipe", "ok", "; ".join([text, *found.notes]), "a batch that the dataset can give")


def _same_dataset(config: Config, store: Store) -> Row:
    check_dataset(run_folder(config), store)
    return Row("dataset of the run", "ok", store.fingerprint, "that of the run's start")
