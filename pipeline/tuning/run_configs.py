"""The runs of a trial: the recipe, the sweep's settings and the drawn values, merged into ordinary checked configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from methods.config import Length
from pipeline.config import Config, WorkerRange
from pipeline.errors import UserError
from pipeline.recipes import assigned, resolve
from pipeline.tuning.sweep_config import FinalConfig, SweepConfig
from pipeline.tuning.sweep_file import method_values, with_settings

Stage = Literal["search", "final"]


def run_configs(
    sweep: SweepConfig,
    label: str,
    values: Mapping[str, Any],
    number: int,
    stage: Stage,
    *,
    length: Length | str | None = None,
    seed: int | None = None,
) -> list[Config]:
    """The configuration of each run of a trial, in the order in which they are trained: the folds of each seed.

    Args:
        sweep: The sweep.
        label: The method.
        values: The setting, by dotted key of the recipe.
        number: Number of the trial; part of the runs' names.
        stage: "search": validates on the folds | "final": measures the test classes.
        length: Length of the runs; None: that of the recipe, or of `final.length` where it is one.
        seed: The only seed; None: all seeds of the stage.

    Raises:
        UserError: The recipe does not accept a key or value.
    """
    final = (sweep.final or FinalConfig()) if stage == "final" else None
    recipe = assigned(method_values(sweep, label), [(key.split("."), value) for key, value in values.items()])
    on_all_classes = sweep.protocol == "paper" or (final is not None and final.classes == "all")
    if final is not None:
        recipe = with_settings(with_settings(recipe, final.settings), sweep.methods[label].final_settings)
        given = final.length if isinstance(final.length, Length) and on_all_classes else None
        length = given if length is None else length
    seeds = [seed] if seed is not None else final.seeds if final is not None else sweep.seeds
    folds: list[int | None] = [None] if on_all_classes else [*sweep.folds]
    return [
        _run(sweep, label, recipe, _name(sweep, number, fold, seed), stage, fold, seed, length)
        for seed in seeds
        for fold in folds
    ]


def _name(sweep: SweepConfig, number: int, fold: int | None, seed: int) -> str:
    return f"{sweep.name}-{number:05d}-{'all' if fold is None else f'fold{fold}'}-seed{seed}"


def _run(
    sweep: SweepConfig,
    label: str,
    recipe: Mapping[str, Any],
    name: str,
    stage: Stage,
    fold: int | None,
    seed: int,
    length: Length | str | None,
) -> Config:
    """The configuration of one run: what the sweep and its protocol decide is set last."""
    sets: dict[str, Any] = {
        "name": name,
        "storage": sweep.storage,
        "seed": seed,
        "protocol": sweep.protocol,
        "data.validation_fold": fold,
        "evaluation.metric": sweep.metric,
        "evaluation.test": sweep.protocol == "paper" or stage == "final",
    }
    if sweep.protocol == "fair":
        sets["evaluation.checkpoint"] = "last" if fold is None else "best"
    if sweep.protocol == "fair" and stage == "search":
        sets["evaluation.clustering"] = False
    if length is not None:
        sets["length"] = str(length)
    values = assigned(recipe, [(key.split("."), value) for key, value in sets.items()])
    try:
        config = resolve(values, sweep.methods[label].recipe)
    except UserError as error:
        raise UserError(f"methods.{label}: {error}") from None
    if isinstance(config.runtime.workers, WorkerRange):
        raise UserError(
            f"methods.{label}: runtime.workers is a range, but the trials of a sweep hold a fixed number each: set a number, and let "
            "more or fewer trials run at once"
        )
    workers = max(1, config.runtime.workers)  # 0 would be the process of the trial, which has no resources of its own
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"workers": workers})})
