"""What a sweep would train: trials, runs, images, hours and resources; nothing is started."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.distributed.ray_session import on_cluster
from pipeline.errors import UserError
from pipeline.runs.run_folder import SUMMARY
from pipeline.runs.summary import protocol
from pipeline.storage import Folder
from pipeline.training.checks import check_run
from pipeline.tuning.checks import check_sweep, method_spaces, num_trials
from pipeline.tuning.resources import TrialResources, trial_resources, trials_here
from pipeline.tuning.run_configs import run_configs
from pipeline.tuning.space import Space
from pipeline.tuning.sweep_config import SchedulerConfig, SweepConfig

SAME = ("dataset", "method", "backbone", "test_pixels", "precision")  # of runs whose speed is comparable
MOST_SUMMARIES = 200  # that are read to find such runs


@dataclass(frozen=True)
class Work:
    """What one stage of one method would train.

    Attributes:
        method: Label of the method.
        stage: "search" or "final".
        trials: Number of trials; None: as many as the hours allow.
        runs: Runs of each trial.
        trial_images: Images of one trial, all its runs together; None where they are not known.
        settings: Number of settings in the space; None: continuous.
        share: Least share of the images that is trained on, with trials stopped early.
    """

    method: str
    stage: str
    trials: int | None
    runs: int
    trial_images: int | None
    settings: int | None
    share: float = 1.0

    @property
    def images(self) -> int | None:
        """Images of all its runs, none stopped early."""
        if self.trials is None or self.trial_images is None:
            return None
        return self.trials * self.trial_images


@dataclass(frozen=True)
class DryRun:
    """What a sweep would train.

    Attributes:
        work: One entry a method and stage.
        resources: Of one trial of each method.
        at_once: Trials at once; None on a cluster that has not been asked.
        speed: Images per second of one trial; None: not known.
        speed_from: Where the speed is from.
    """

    work: list[Work]
    resources: dict[str, TrialResources]
    at_once: int | None
    speed: float | None
    speed_from: str

    @property
    def trials(self) -> int | None:
        counts = [work.trials for work in self.work]
        return None if None in counts else sum(count for count in counts if count is not None)

    def images(self, least: bool = False) -> int | None:
        """Images of the whole sweep, with or without stopping trials early; None where they are not known."""
        counts = [None if work.images is None else work.images * (work.share if least else 1.0) for work in self.work]
        return None if None in counts else round(sum(count for count in counts if count is not None))

    def hours(self, least: bool = False) -> float | None:
        """Hours of training, on all trials at once; without their starts and evaluations."""
        images = self.images(least)
        if images is None or self.speed is None or self.at_once is None:
            return None
        return images / self.speed / self.at_once / 3600


def dry_run(sweep: SweepConfig, images_per_second: float | None = None, console: Console | None = None) -> DryRun:
    """Checks a sweep and prints what it would train.

    Args:
        sweep: The sweep.
        images_per_second: Speed of one trial; None: that of a finished run of the same dataset, method and backbone.
        console: Where it is printed; None: the standard output.

    Raises:
        UserError: The sweep cannot be trained as it is.
    """
    if images_per_second is not None and images_per_second <= 0:
        raise UserError(f"--images-per-second is {images_per_second:g}, expected more than 0")
    plan = expected(sweep, check_sweep(sweep, weights=False), images_per_second)
    out = console or Console(markup=False, emoji=False)
    out.print(_table(sweep, plan))
    for line in _lines(sweep, plan):
        out.print(line, highlight=False, soft_wrap=True)
    return plan


def expected(sweep: SweepConfig, stores: dict[str, Store], images_per_second: float | None = None) -> DryRun:
    """The work of a sweep that has been checked.

    Args:
        sweep: The sweep.
        stores: Dataset of each method, as far as they are prepared.
        images_per_second: Speed of one trial, if it is known.
    """
    work: list[Work] = []
    resources, configs = {}, {}
    for label, space in method_spaces(sweep).items():
        configs[label] = run_configs(sweep, label, space.corners()[0], 0, "search")[0]
        resources[label] = trial_resources(configs[label])
        work += _work(sweep, label, space, stores.get(label))
    at_once = sweep.trials_at_once
    if not on_cluster():
        at_once = at_once or trials_here(resources.values())
    speed, speed_from = images_per_second, "as given"
    if speed is None:
        speed, speed_from = _known_speed(sweep, configs, stores)
    return DryRun(work, resources, at_once, speed, speed_from)


def _work(sweep: SweepConfig, label: str, space: Space, store: Store | None) -> Iterator[Work]:
    values = space.corners()[0]
    search = run_configs(sweep, label, values, 0, "search")
    trials, share = num_trials(sweep, label, space), least_share(sweep.scheduler)
    yield Work(label, "search", trials, len(search), _images(search, store), space.size(), share)
    if sweep.final is not None:
        seeds = sweep.final.seeds
        final = run_configs(sweep, label, values, 0, "final", seed=seeds[0])
        yield Work(label, "final", len(seeds), len(final), _images(final, store), None)


def _images(configs: list[Config], store: Store | None) -> int | None:
    """Images that some runs train on; None if the dataset is not there or their plans are made while training."""
    images = 0
    for config in configs:
        shape = None if store is None else check_run(config, store).epoch_shape
        if shape is None:
            return None
        images += config.length.steps(shape[0]) * shape[1]
    return images


def least_share(scheduler: SchedulerConfig) -> float:
    """The least share of all images that is trained on if every rung continues one of `reduction` trials, or none."""
    if scheduler.name == "median":
        return scheduler.grace
    if scheduler.name != "asha":
        return 1.0
    share, rung, left = scheduler.grace, scheduler.grace, 1.0
    while rung < 1:
        left /= scheduler.reduction
        end = min(1.0, rung * scheduler.reduction)
        share += left * (end - rung)
        rung = end
    return share


def _known_speed(sweep: SweepConfig, configs: dict[str, Config], stores: dict[str, Store]) -> tuple[float | None, str]:
    """Images per second of finished runs of the same storage with the same dataset, method and network: the slowest method's."""
    if not stores:
        return None, "the dataset is not prepared yet"
    wanted = {label: protocol(configs[label], store) for label, store in stores.items()}
    folder = Folder(sweep.root) / "runs"
    speeds: dict[str, list[float]] = {label: [] for label in configs}
    for name in folder.names()[-MOST_SUMMARIES:]:
        if not folder.exists(f"{name}/{SUMMARY}"):
            continue
        summary = folder.read_json(f"{name}/{SUMMARY}")
        for label, same in wanted.items():
            if all(summary["protocol"].get(key) == same[key] for key in SAME):
                speeds[label].append(float(summary["images_per_second"]))
    known = {label: statistics.median(found) for label, found in speeds.items() if found}
    if not known:
        return None, "no finished run of this dataset, method and network is in the storage"
    label = min(known, key=lambda label: known[label])
    return known[label], f"median of {len(speeds[label])} finished runs of {label}"


def _table(sweep: SweepConfig, plan: DryRun) -> Table:
    table = Table(title=f"sweep {sweep.name}, {sweep.protocol} protocol", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("method", overflow="fold", min_width=min(24, max(len(label) for label in sweep.methods)))
    table.add_column("stage")
    for title in ("settings", "trials", "runs", "images/trial", "images"):
        table.add_column(title, justify="right")
    for work in plan.work:
        settings = "" if work.stage == "final" else "continuous" if work.settings is None else f"{work.settings:,}"
        trials = "?" if work.trials is None else f"{work.trials:,}"
        runs = "?" if work.trials is None else f"{work.trials * work.runs:,}"
        table.add_row(work.method, work.stage, settings, trials, runs, _count(work.trial_images), _count(work.images))
    return table


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _lines(sweep: SweepConfig, plan: DryRun) -> Iterator[str]:
    searched = "; ".join(f"{name} {value}" for name, value in _limits(sweep) if value)
    yield f"search: {sweep.searcher.name}, scheduler {sweep.scheduler.name}, by {sweep.metric}; {searched}"
    most, least = plan.images(), plan.images(least=True)
    early = f", at least {least:,} where trials are stopped early" if least is not None and least != most else ""
    if most is not None:
        yield f"images: {most:,}{early}"
    else:
        yield "images: not known before the dataset is prepared and the number of trials is set"
    kinds: dict[str, list[str]] = {}
    for label, resources in plan.resources.items():
        workers = "1 worker" if resources.workers == 1 else f"{resources.workers} workers"
        kinds.setdefault(f"{workers}, {resources}", []).append(label)
    for text, labels in kinds.items():
        yield f"one trial ({', '.join(labels)}): {text}"
    if plan.at_once is None:
        yield "trials at once: as many as the cluster holds at its largest"
    else:
        yield f"trials at once: {plan.at_once}"
    hours = plan.hours()
    if hours is not None:
        shortest = plan.hours(least=True)
        early = f", at least {_time(shortest)}" if shortest is not None and shortest < hours else ""
        yield f"training: at most {_time(hours)}{early}, at {plan.speed:,.0f} images per second and trial ({plan.speed_from})"
    elif plan.speed is None:
        yield f"hours: not known, {plan.speed_from}: give the speed of one trial by --images-per-second"


def _limits(sweep: SweepConfig) -> Iterator[tuple[str, str]]:
    budget = sweep.budget
    yield "hours at most", "" if budget.hours is None else f"{budget.hours:g}"
    yield "GPU-hours at most", "" if budget.gpu_hours is None else f"{budget.gpu_hours:g}"
    yield "validation folds", ", ".join(map(str, sweep.folds)) if sweep.protocol == "fair" else "none (test classes)"
    yield "seeds", ", ".join(map(str, sweep.seeds))
    final = sweep.final
    if final is not None:
        where = "all training classes" if final.classes == "all" else "each fold"
        yield "final runs on", f"{where}, seeds {', '.join(map(str, final.seeds))}"


def _time(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
