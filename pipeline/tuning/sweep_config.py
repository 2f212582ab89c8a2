"""The sweep file: what is searched, how, for how long, and how the chosen settings are measured."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from methods.config import BaseConfig, Length
from pipeline.storage import home

Settings = dict[str, Any]  # keys of a recipe, dotted or nested


class MethodEntry(BaseConfig):
    """One of the methods that are compared."""

    recipe: str = Field("baseline/emoji", description="preset, or YAML file (relative to the sweep file)")
    values: Settings | None = Field(
        None, description="content of the recipe when the sweep was started; filled in by the program"
    )
    settings: Settings = Field(default_factory=dict, description="keys of the recipe that are set for this method")
    final_settings: Settings = Field(
        default_factory=dict,
        description="keys of the recipe that are set in this method's final runs only, such as weights that were trained on all classes",
    )
    space: Settings = Field(
        default_factory=dict, description="search space of this method, beside the sweep's: distribution by key"
    )
    points: list[Settings] = Field(
        default_factory=list, description="settings tried first, each key of the space with its value"
    )


class SearcherConfig(BaseConfig):
    """Draws the settings; every method has a search of its own."""

    name: Literal["grid", "random", "tpe", "gp"] = Field(
        "tpe", description="grid: every combination | random | Optuna's TPE | Optuna's Gaussian process"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the drawn settings")
    startup_trials: int = Field(
        10, ge=1, description="trials of a method drawn at random before the sampler models them (tpe, gp)"
    )


class SchedulerConfig(BaseConfig):
    """Stops trials that do worse than others at the same number of images trained on; every method has its own."""

    name: Literal["none", "asha", "median", "pbt"] = Field(
        "asha", description="none | asynchronous successive halving | median rule | population-based training"
    )
    grace: float = Field(
        0.25, gt=0, le=1, description="share of a trial's length before which it is not stopped (asha, median)"
    )
    reduction: float = Field(2.0, gt=1, description="asha: one of this many trials is continued at each rung")
    interval: float = Field(
        0.25, gt=0, le=1, description="pbt: share of a trial's length between two copies of better trials"
    )
    quantile: float = Field(0.25, gt=0, le=0.5, description="pbt: share of trials that copy, and that are copied from")


class BudgetConfig(BaseConfig):
    """Ends the search; the chosen settings' final runs come on top."""

    trials: int | None = Field(None, ge=1, description="trials of each method (grid: all combinations if none)")
    hours: float | None = Field(None, gt=0, description="no new trial starts after this wall time, all starts together")
    gpu_hours: float | None = Field(
        None, gt=0, description="no new trial starts after these GPU-hours, all methods together"
    )


class FinalConfig(BaseConfig):
    """Each method's chosen setting, trained again and measured on the test classes, once."""

    seeds: list[int] = Field([0, 1, 2, 3, 4], min_length=1, description="seeds; the interval is over them")
    classes: Literal["all", "folds"] = Field(
        "all",
        description="all: trained on all training classes, last checkpoint | folds: once a fold of the search, best "
        "checkpoint by validation, as in the Metric Learning Reality Check",
    )
    length: Length | Literal["best", "same"] = Field(
        "best",
        description="length of the final runs on all classes: best: the mean epoch of the chosen trial's best validations | "
        "same: that of the search | a length",
    )
    settings: Settings = Field(default_factory=dict, description="keys of the recipe that are set in final runs only")


class SweepConfig(BaseConfig):
    """A sweep."""

    name: str = Field(
        "sweep",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the sweep and of its folder below STORAGE/sweeps",
    )
    storage: str = Field(
        "",
        description="folder of datasets, runs and sweeps, an absolute path or s3:// URI (default $RAYDML_HOME, else ~/raydml)",
    )
    protocol: Literal["fair", "paper"] = Field(
        "fair",
        description="fair: choices on folds of the training classes, test classes measured once, by the final runs | paper: the "
        "published recipe, chosen on the test classes, last and best checkpoint shown",
    )
    methods: dict[str, MethodEntry] = Field(min_length=1, description="the methods that are compared, by label")
    settings: Settings = Field(default_factory=dict, description="keys of the recipe that are set for all methods")
    space: Settings = Field(default_factory=dict, description="search space of all methods: distribution by key")
    searcher: SearcherConfig = SearcherConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    budget: BudgetConfig = BudgetConfig()
    metric: str = Field("map@r", description="metric that chooses, on the validation classes (evaluation.metric)")
    folds: list[int] = Field([0], min_length=1, description="fair: folds that every setting is trained on")
    seeds: list[int] = Field([0], min_length=1, description="seeds that every setting is trained with")
    trials_at_once: int | None = Field(
        None, ge=1, description="largest number of trials at once (none: as many as the cluster holds at its largest)"
    )
    retries: int = Field(3, ge=0, description="restarts of a trial whose process or node was lost")
    final: FinalConfig | None = Field(
        FinalConfig(), description="measurement of the chosen settings; none: the test classes are not measured"
    )

    def space_of(self, label: str) -> Settings:
        """Distributions of one method: the sweep's, and its own, whose keys win."""
        return {**self.space, **self.methods[label].space}

    @property
    def root(self) -> str:
        """Folder of datasets, runs and sweeps, with the default filled in."""
        return self.storage or home()
