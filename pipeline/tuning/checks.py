"""Checks of a sweep before its first trial: each is told in one line that names the sweep's key and what to change."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config, changed_keys
from pipeline.console import console
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.evaluation.tasks import test_task
from pipeline.trackers.choose import check_trackers
from pipeline.training.checks import check_run, checked_trunk
from pipeline.training.start import open_dataset
from pipeline.tuning.run_configs import Stage, run_configs
from pipeline.tuning.space import Space
from pipeline.tuning.sweep_config import SweepConfig

EQUAL = 0.05  # budgets that differ by no more than this share of the smaller one are equal
# Keys of a recipe that the sweep decides, and how.
DECIDED = {
    "name": "runs are named after the sweep and the trial",
    "storage": "set storage of the sweep",
    "seed": "set seeds of the sweep",
    "protocol": "set protocol of the sweep",
    "data.validation_fold": "set folds of the sweep",
    "evaluation.metric": "set metric of the sweep",
    "evaluation.test": "the test classes are measured by the final runs, see final",
    "evaluation.checkpoint": "the best one by validation is measured, or the last one where all classes are trained on",
}
PACKAGES = {"tpe": "optuna", "random": "optuna", "gp": "optuna"}


@dataclass(frozen=True)
class Setting:
    """A setting that is checked, and its run.

    Attributes:
        label: The method.
        values: The setting, by dotted key.
        config: The run's configuration.
        stage: Of a search trial, or of a final one.
        images: Images that the run trains on; None before the check of its dataset.
    """

    label: str
    values: Mapping[str, Any]
    config: Config
    stage: Stage
    images: int | None = None


def check_sweep(sweep: SweepConfig, weights: bool = True) -> dict[str, Store]:
    """Checks keys, ranges, budgets and datasets; returns each method's dataset, without those that are still to be prepared.

    Both ends of every range and every option of every choice are put into a configuration and planned on every fold.

    Args:
        sweep: The sweep.
        weights: The networks are built too, with their weights, which may be downloaded.

    Raises:
        UserError: One line.
    """
    _check_packages(sweep)
    _check_protocol(sweep)
    spaces = method_spaces(sweep)
    _check_budget(sweep, spaces)
    settings = [s for label, space in spaces.items() for s in _settings(sweep, label, space)]
    sources = {setting.label: setting.config.data.source for setting in settings}
    if len(set(sources.values())) > 1:
        (first, source), *others = sources.items()
        label, other = next((label, other) for label, other in others if other != source)
        raise UserError(
            f"methods.{first} trains on {source}, methods.{label} on {other}: figures of two datasets cannot be compared, "
            "make a sweep of each (data.source)"
        )
    for config in {setting.label: setting.config for setting in settings}.values():
        check_trackers(config)
    if weights:
        _check_networks(settings)
    store = open_dataset(settings[0].config)
    if store is None:
        return {}
    _check_dataset(sweep, store)
    checked = _check_runs(sweep, spaces, settings, store)
    if sweep.protocol == "fair":
        for fold in sweep.folds:
            _check_equal_images([s for s in checked if s.stage == "search" and s.config.data.validation_fold == fold])
    return {label: store for label in sweep.methods}


def method_spaces(sweep: SweepConfig) -> dict[str, Space]:
    """The search space of each method: the sweep's and its own, whose keys win.

    Raises:
        UserError: A space cannot be meant, or has a key that the sweep decides.
    """
    spaces = {}
    for label, entry in sweep.methods.items():
        Space(sweep.space)
        Space(entry.space, f"methods.{label}.space")
        spaces[label] = Space(sweep.space_of(label), f"space of {label}")
        for key in spaces[label].all_keys:
            _check_key(sweep, key, place_of(sweep, label, key))
            if key != "length" and changed_keys({}, {key: 0}, runtime=True):
                raise UserError(f"{place_of(sweep, label, key)}: {key} changes no figure: set it in settings")
            if key == "length" and sweep.protocol == "fair":
                raise UserError(
                    f"{place_of(sweep, label, key)}: length is the budget, which is equal for all under fair"
                )
            if key == "data.source":
                raise UserError(
                    f"{place_of(sweep, label, key)}: {key} cannot be searched: make a sweep of each dataset"
                )
        if entry.final_settings and sweep.final is None:
            raise UserError(
                f"methods.{label}.final_settings are given, but final is none: leave them out, or set final"
            )
        for key in sorted(set(_flat(entry.final_settings)) & {"length", "data.source"}):
            raise UserError(
                f"methods.{label}.final_settings: {key} has to be the same for all methods: set "
                f"{'final.length' if key == 'length' else 'settings.data.source'}"
            )
        for where, settings in (
            ("settings", sweep.settings),
            (f"methods.{label}.settings", entry.settings),
            (f"methods.{label}.final_settings", entry.final_settings),
        ):
            for key in _flat(settings):
                _check_key(sweep, key, where)
    return spaces


def num_trials(sweep: SweepConfig, label: str, space: Space) -> int | None:
    """Search trials of a method; None: as many as the hours allow."""
    grid = space.size() if sweep.searcher.name == "grid" else None
    limits = [sweep.budget.trials, None if grid is None else grid + len(sweep.methods[label].points)]
    return min((limit for limit in limits if limit is not None), default=None)


def place_of(sweep: SweepConfig, label: str, key: str) -> str:
    """The section of the sweep's file in which a key of a method's space stands."""
    own = Space(sweep.methods[label].space)
    return f"methods.{label}.space" if key in own.all_keys else "space"


# ---- without a dataset -----------------------------------------------------------------------------------------------


def _check_packages(sweep: SweepConfig) -> None:
    package = PACKAGES.get(sweep.searcher.name)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"searcher {sweep.searcher.name} needs the package {package}: pip install {package}")


def _check_protocol(sweep: SweepConfig) -> None:
    for key in ("folds", "seeds"):
        _check_distinct(key, getattr(sweep, key))
    if sweep.final is not None:
        _check_distinct("final.seeds", sweep.final.seeds)
        for key in _flat(sweep.final.settings):
            _check_key(sweep, key, "final.settings")
    if any(fold < 0 for fold in sweep.folds):
        raise UserError(f"folds: got {min(sweep.folds)}, folds are numbered from 0")
    if sweep.protocol == "paper" and sweep.final is not None:
        raise UserError(
            "final: under the paper protocol every trial measures the test classes itself, and is chosen on them: set final "
            "to none (and seeds to several), or protocol to fair"
        )
    if sweep.protocol == "paper" and sweep.folds != [0]:
        raise UserError(
            "folds: the paper protocol trains on all training classes: leave out folds, or set protocol to fair"
        )
    if sweep.scheduler.name == "pbt" and sweep.final is not None:
        raise UserError(
            "scheduler pbt changes settings while it trains, so that there is no single setting to train again: set final to "
            "none, or scheduler.name to asha"
        )


def _check_distinct(key: str, numbers: Sequence[int]) -> None:
    twice = [number for i, number in enumerate(numbers) if number in numbers[:i]]
    if twice:
        raise UserError(f"{key}: {twice[0]} stands twice")


def _check_key(sweep: SweepConfig, key: str, where: str) -> None:
    """Raises UserError for a key of the recipe that the sweep decides."""
    if key in DECIDED and not (key == "evaluation.checkpoint" and sweep.protocol == "paper"):
        raise UserError(f"{where}: {key} is decided by the sweep: {DECIDED[key]}")


def _check_budget(sweep: SweepConfig, spaces: Mapping[str, Space]) -> None:
    budget, searcher = sweep.budget, sweep.searcher.name
    if searcher == "grid":
        for space in spaces.values():
            if space.size() is None:
                next(space.grid())  # raises, and names the key
    elif budget.trials is None and budget.hours is None and budget.gpu_hours is None:
        raise UserError(
            f"budget: searcher {searcher} draws settings without end: set budget.trials, hours or gpu_hours"
        )
    counts = {label: num_trials(sweep, label, space) for label, space in spaces.items()}
    for label, space in spaces.items():
        if space.size() == 1 and counts[label] != 1:
            raise UserError(
                f"methods.{label}: the space is empty, there is only one setting: name keys with their distributions in space "
                f"or methods.{label}.space, or set budget.trials to 1"
            )
        if len(sweep.methods[label].points) > (counts[label] or 10**9):
            raise UserError(
                f"methods.{label}.points has {len(sweep.methods[label].points)} points, budget.trials is {budget.trials}: "
                "allow more trials, or give fewer points"
            )
    if sweep.protocol == "fair" and len(set(counts.values())) > 1:
        (first, count), *others = counts.items()
        label, other = next((label, other) for label, other in others if other != count)
        raise UserError(
            f"the fair protocol gives every method the same budget, but {first} has {count} trials and {label} {other} "
            "(combinations of the grid): set budget.trials to the smaller number, or use a searcher that draws"
        )


def _settings(sweep: SweepConfig, label: str, space: Space) -> Iterator[Setting]:
    """The corners of a space and the given points, with the runs of one seed on every fold, and the final run.

    Raises:
        UserError: The configuration refuses one of them.
    """
    points = [space.check_point(p, f"methods.{label}.points[{i}]") for i, p in enumerate(sweep.methods[label].points)]
    for values in [*space.corners(), *points]:
        stages: list[Stage] = ["search"] if sweep.final is None else ["search", "final"]
        for stage in stages:
            seed = sweep.seeds[0] if stage == "search" or sweep.final is None else sweep.final.seeds[0]
            try:
                configs = run_configs(sweep, label, values, 0, stage, seed=seed)
            except UserError as error:
                raise UserError(_blamed(sweep, label, space, values, stage, str(error))) from None
            if stage == "search":
                _check_gpu_hours(sweep, configs[0])
            for config in configs:
                yield Setting(label, values, config, stage)


def _check_gpu_hours(sweep: SweepConfig, config: Config) -> None:
    if sweep.budget.gpu_hours is not None and not config.runtime.gpus_per_worker:
        raise UserError(
            "budget.gpu_hours limits nothing where trials train on CPUs: set runtime.gpus_per_worker in settings, or "
            "budget.hours"
        )


def _blamed(sweep: SweepConfig, label: str, space: Space, values: Mapping[str, Any], stage: Stage, reason: str) -> str:
    """The reason with the keys of the space that it speaks of, or else with the whole setting."""
    reason = reason.removeprefix(f"methods.{label}: ")
    searched = [key for key in values if key in space.keys]
    about = reason.split(": did you mean")[0]  # a suggested key is not to blame
    named = [key for key in searched if re.search(rf"(?<![\w.]){re.escape(key)}(?!\.?\w)", about)]
    named = named or [key for key in searched if re.search(rf"(?<!\w){re.escape(key.split('.')[-1])}(?!\w)", about)]
    unknown = re.match(r"unknown key '([^']+)'", about)
    if unknown is not None:  # of the space, or of settings that have nothing to do with it
        named = [key for key in searched if key == unknown[1] or key.startswith(f"{unknown[1]}.")]
    elif not named:
        named = searched
    run = "" if stage == "search" else " in final runs"
    setting = ", ".join(f"{place_of(sweep, label, key)}.{key} = {values[key]!r}" for key in named)
    return f"methods.{label}{run}: {f'{setting}: ' if setting else ''}{reason}"


def _check_networks(settings: Sequence[Setting]) -> None:
    """Builds each network once, with its weights."""
    seen = set()
    for setting in settings:
        config = setting.config
        model, transforms = config.model.model_dump(mode="json"), config.data.transforms
        key = json.dumps(
            [model, transforms.size, transforms.evaluation_scale, config.runtime.images_per_pass], sort_keys=True
        )
        if key in seen:
            continue
        seen.add(key)
        try:
            note = checked_trunk(config).weights_note
        except UserError as error:
            raise UserError(f"methods.{setting.label}: {error}") from None
        if note:
            console.print(note, markup=False, highlight=False, soft_wrap=True)


# ---- with the dataset ------------------------------------------------------------------------------------------------


def _check_dataset(sweep: SweepConfig, store: Store) -> None:
    folds = len(store.manifest["folds"])
    missing = [fold for fold in sweep.folds if fold >= folds]
    if sweep.protocol == "fair" and missing:
        has = f"the folds 0 to {folds - 1}" if folds else "no folds"
        raise UserError(f"folds: got {missing[0]}, {store.title} has {has}")


def _check_runs(
    sweep: SweepConfig, spaces: Mapping[str, Space], settings: Sequence[Setting], store: Store
) -> list[Setting]:
    """Plans an epoch of each setting on its fold; returns the settings with the images that they train on.

    Raises:
        UserError: Some batch is impossible, a metric is not measured on this dataset, or there is nothing to measure.
    """
    notes: dict[str, None] = {}
    out = []
    for s in settings:
        try:
            checked = check_run(s.config, store)
        except UserError as error:
            fold = s.config.data.validation_fold
            where = "" if fold is None else f" (trained without fold {fold})"
            raise UserError(_blamed(sweep, s.label, spaces[s.label], s.values, s.stage, f"{error}{where}")) from None
        if s.stage == "final" and test_task(s.config, store) is None:
            raise UserError(f"final: {store.title} has no test classes to measure: set final to none")
        of_epoch = () if checked.epoch_note is None else (f"{s.label}: {checked.epoch_note}",)
        notes |= dict.fromkeys((*of_epoch, *checked.dataset_notes))
        images = None
        if checked.epoch_shape is not None:
            steps, batch = checked.epoch_shape
            images = s.config.length.steps(steps) * batch
            notes |= dict.fromkeys(_late_validation(sweep, s, steps))
        out.append(Setting(s.label, s.values, s.config, s.stage, images))
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    return out


def _late_validation(sweep: SweepConfig, setting: Setting, steps_per_epoch: int) -> Iterator[str]:
    """A note where validations are too rare for what the scheduler is asked to do."""
    scheduler, config = sweep.scheduler, setting.config
    wanted = {"asha": scheduler.grace, "median": scheduler.grace, "pbt": scheduler.interval}.get(scheduler.name)
    share = config.evaluation.every.steps(steps_per_epoch) / config.length.steps(steps_per_epoch)
    if setting.stage == "search" and wanted is not None and share > 1.1 * wanted:  # a step more, by rounding
        yield (
            f"methods.{setting.label} is validated every {config.evaluation.every} of {config.length}: scheduler "
            f"{scheduler.name} acts no earlier and no more often; evaluation.every shorter than {wanted:.0%} of the length lets it"
        )


def _check_equal_images(settings: Sequence[Setting]) -> None:
    """Raises UserError unless all settings on one fold train on the same number of images, about."""
    known = [(setting.images, setting) for setting in settings if setting.images is not None]
    if not known:
        return
    fewest, least = min(known, key=lambda item: item[0])
    most, largest = max(known, key=lambda item: item[0])
    if most <= fewest * (1 + EQUAL):
        return
    labels = list(dict.fromkeys([least.label, largest.label]))
    whose = " and ".join(f"methods.{label}.settings" for label in labels)
    setting = "" if len(labels) > 1 else f", from {_text(least)} to {_text(largest)}"
    raise UserError(
        f"the fair protocol gives every setting the same budget, but a run of {least.label} trains on {fewest:,} images "
        f"({least.config.length}) and one of {largest.label} on {most:,} ({largest.config.length}){setting}: set length in {whose}"
    )


def _text(setting: Setting) -> str:
    return ", ".join(f"{key} = {value!r}" for key, value in setting.values.items())


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of settings."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
