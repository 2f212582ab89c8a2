"""Sweep files: YAML and `--set a.b=c`, checked; the resolved sweep in the sweep's folder; and what may change between starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from methods import plugins
from methods.config import Length
from pipeline.config import Config, changed_keys, name_for
from pipeline.config_problems import explain
from pipeline.errors import UserError, close_names
from pipeline.metric_names import metric_key
from pipeline.recipes import assigned, merged, parse_override, preset_names, read_yaml, recipe_values
from pipeline.storage import Folder
from pipeline.tuning.shipped import find_sweep_file
from pipeline.tuning.space import flat_space
from pipeline.tuning.sweep_config import MethodEntry, SweepConfig
from pipeline.tuning.sweep_folder import SWEEP

EXAMPLE = "`methods: {margin: {recipe: baseline/emoji}}`"
_BY_KEY = ("settings", "final_settings", "space")  # sections whose own keys are dotted
MAY_CHANGE = ("storage", "budget", "trials_at_once", "retries", "final")


def load_sweep(path: str, overrides: Sequence[str] = ()) -> SweepConfig:
    """Reads a sweep file and applies overrides.

    Args:
        path: A YAML file, or the name of a shipped one ("emoji_quick").
        overrides: "a.b=c" each; c is read as YAML. What follows `settings.`, `final_settings.` or `space.` is one dotted key of the recipe.

    Raises:
        UserError: One line a problem, naming the key, what was got and what was expected.
    """
    file = find_sweep_file(path)
    values = read_yaml(file, EXAMPLE)
    values = _with_flat_spaces({"name": file.stem} | values)
    for override in overrides:
        keys, value = parse_override(override)
        at = {"methods": 2, "final": 1}.get(keys[0], 0)
        is_dotted = len(keys) > at + 1 and keys[at] in _BY_KEY
        values = assigned(values, [([*keys[: at + 1], ".".join(keys[at + 1 :])] if is_dotted else keys, value)])
    if str(values.get("protocol")).lower() == "paper":
        values.setdefault("final", None)  # every trial measures the test classes itself
    if isinstance(values.get("metric"), str):
        values["metric"] = metric_key(values["metric"])
    sweep = build_sweep(_with_flat_spaces(values))
    plugins.add_folder(file.parent)  # modules of the user's own may lie beside the sweep file
    methods = {label: _with_recipe(label, entry, file.parent) for label, entry in sweep.methods.items()}
    return sweep.model_copy(update={"methods": methods})


def build_sweep(values: Mapping[str, Any]) -> SweepConfig:
    """Validates a mapping.

    Raises:
        UserError: One line a problem.
    """
    try:
        return SweepConfig.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("; ".join(_explain(dict(problem), values) for problem in error.errors())) from None


def dump_sweep(sweep: SweepConfig) -> str:
    """The resolved sweep as YAML; `read_sweep` reads it back equal."""
    return yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_sweep(folder: Folder) -> SweepConfig:
    """The sweep that a folder belongs to, as it was last started.

    Raises:
        UserError: This version does not accept it.
    """
    try:
        return build_sweep(yaml.safe_load(folder.read(SWEEP)))
    except (UserError, yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}/{SWEEP} was written by another version or changed by hand, this one does not accept it ({error}): "
            "start the sweep under another name"
        ) from None


def method_values(sweep: SweepConfig, label: str) -> dict[str, Any]:
    """The recipe's values of one method, with the sweep's settings and then its own; not yet checked.

    Nested settings are merged as a file onto its preset, then dotted ones are set as by `--set`.
    """
    entry = sweep.methods[label]
    values = recipe_values(entry.recipe) if entry.values is None else entry.values
    return with_settings(with_settings(values, sweep.settings), entry.settings)


def with_settings(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with further keys, dotted or nested."""
    values = merged(dict(values), {key: value for key, value in settings.items() if "." not in key})
    return assigned(values, [(key.split("."), value) for key, value in settings.items() if "." in key])


def check_same_sweep(old: SweepConfig, new: SweepConfig) -> list[str]:
    """Compares with the sweep that a folder was started with; returns what has changed and may.

    A sweep may grow: its budget, further methods and points, more final seeds; and it may run elsewhere, with other `runtime` keys.

    Raises:
        UserError: Anything else differs: trials of different lengths or spaces could not be compared.
    """
    allowed, forbidden = _changes(old, new)
    if forbidden:
        lines = [f"{key}: {before} -> {after}" for key, (before, after) in forbidden.items()]
        name = name_for(new.name, {key: after for key, (_, after) in forbidden.items()})
        raise UserError(
            f"the name {new.name} belongs to a sweep of other settings ({'; '.join(lines[:4])}{' ...' if len(lines) > 4 else ''}): "
            f"give this one another name, for example --set name={name}"
        )
    return [f"{key}: {before} -> {after}" for key, (before, after) in allowed.items()]


_Changes = dict[str, tuple[Any, Any]]


def _changes(old: SweepConfig, new: SweepConfig) -> tuple[_Changes, _Changes]:
    """Old and new value of each key that has changed: of those that may, and of the others."""
    allowed: _Changes = {}
    forbidden: _Changes = {}
    methods = {"methods", "settings", "space", "name"}
    before, after = (sweep.model_dump(mode="json", exclude=methods) for sweep in (old, new))
    for key, values in changed_keys(before, after, runtime=False).items():
        (allowed if _may_change(key, old, new) else forbidden)[key] = values
    for label in [*old.methods, *(label for label in new.methods if label not in old.methods)]:
        if label not in new.methods:
            forbidden[f"methods.{label}"] = ("compared", "left out")
        elif label not in old.methods:
            allowed[f"methods.{label}"] = ("left out", "compared")
        else:
            _method_changes(old, new, label, allowed, forbidden)
    return allowed, forbidden


def _may_change(key: str, old: SweepConfig, new: SweepConfig) -> bool:
    """True if a key of the sweep's own may change; final runs that are there stay, so that only seeds may be added."""
    if key.split(".")[0] != "final" or old.final is None or new.final is None:
        return key.split(".")[0] in MAY_CHANGE
    return key == "final.seeds" and set(old.final.seeds) <= set(new.final.seeds)


def _method_changes(old: SweepConfig, new: SweepConfig, label: str, allowed: _Changes, forbidden: _Changes) -> None:
    before, after = old.methods[label], new.methods[label]
    where = f"methods.{label}"
    if before.recipe != after.recipe and not (os.path.isabs(before.recipe) and os.path.isabs(after.recipe)):
        forbidden[f"{where}.recipe"] = (before.recipe, after.recipe)  # files may lie elsewhere, on another machine
        return
    values = method_values(old, label), method_values(new, label)
    allowed |= {
        f"{where}.settings.{key}": value
        for key, value in changed_keys(*values, runtime=True).items()
        if key != "length"
    }
    forbidden |= {f"{where}.settings.{key}": value for key, value in changed_keys(*values, runtime=False).items()}
    lengths = [Length.model_validate(v.get("length", Config.model_fields["length"].default)) for v in values]
    if lengths[0] != lengths[1]:
        forbidden[f"{where}.settings.length"] = (str(lengths[0]), str(lengths[1]))
    if before.final_settings != after.final_settings:
        forbidden[f"{where}.final_settings"] = (before.final_settings, after.final_settings)
    spaces = old.space | before.space, new.space | after.space
    for key in dict.fromkeys([*spaces[0], *spaces[1]]):
        if spaces[0].get(key) != spaces[1].get(key) or (key in spaces[0]) != (key in spaces[1]):
            forbidden[f"{where}.space.{key}"] = (spaces[0].get(key), spaces[1].get(key))
    if before.points != after.points:
        grows = all(point in after.points for point in before.points)
        (allowed if grows else forbidden)[f"{where}.points"] = (before.points, after.points)


def _with_flat_spaces(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the keys of all spaces dotted, so that `--set` and a method's own space replace whole distributions."""
    out = dict(values)
    if isinstance(out.get("space"), Mapping):
        out["space"] = flat_space(out["space"], "space")
    if isinstance(out.get("methods"), Mapping):
        out["methods"] = dict(out["methods"])
        for label, entry in out["methods"].items():
            if isinstance(entry, Mapping) and isinstance(entry.get("space"), Mapping):
                out["methods"][label] = {**entry, "space": flat_space(entry["space"], f"methods.{label}.space")}
    return out


def _with_recipe(label: str, entry: MethodEntry, folder: Path) -> MethodEntry:
    """The entry with the content of its recipe: the trials' nodes may not have the file, and it may change between two starts."""
    if entry.values is not None:
        raise UserError(f"methods.{label}.values is filled in by the program: name a recipe, and set keys in settings")
    recipe = entry.recipe
    path = folder / os.path.expanduser(recipe)
    if recipe not in preset_names() and (path.is_file() or recipe.endswith((".yaml", ".yml"))):
        recipe = str(path.resolve())
    try:
        return entry.model_copy(update={"recipe": recipe, "values": recipe_values(recipe)})
    except UserError as error:
        raise UserError(f"methods.{label}.recipe: {error}") from None


def _explain(problem: dict[str, Any], values: Mapping[str, Any]) -> str:
    """One line for one pydantic problem; a key of a recipe that stands among the sweep's own is told where it belongs."""
    location = [str(part) for part in problem["loc"]]
    in_method = location[0] == "methods" and len(location) > 2
    if problem["type"] == "extra_forbidden" and len(location) == (3 if in_method else 1):
        key = location[-1].split(".")[0]
        known = MethodEntry.model_fields if in_method else SweepConfig.model_fields
        if key in Config.model_fields and not close_names(location[-1], known):
            place = ".".join([*location[:-1], "settings"])
            return f"unknown key {'.'.join(location)!r}: keys of the recipe stand below {place}"
    if in_method:
        entry: Any = {str(label): entry for label, entry in values["methods"].items()}[location[1]]
        inner = explain(
            {**problem, "loc": problem["loc"][2:]}, entry if isinstance(entry, Mapping) else {}, MethodEntry
        )
        return f"methods.{location[1]}: {inner}"
    return explain(problem, values, SweepConfig)
