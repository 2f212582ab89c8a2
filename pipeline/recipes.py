"""Recipes: a preset, a YAML file and `--set a.b=c`, merged into a configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from methods import plugins
from pipeline.config import Config, build_config
from pipeline.errors import UserError, did_you_mean, joined_lines

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "baseline/emoji"


def load_config(recipe: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe and applies overrides.

    Args:
        recipe: A YAML file or the name of a preset ("baseline/emoji"); the default preset if None.
            A file may build on a preset with the key `preset`, as presets do on each other.
        overrides: "a.b=c" each; c is read as YAML.

    Raises:
        UserError: One line a problem, naming the key, what was got and what was expected.
    """
    plugins.add_folder(os.getcwd())
    values = _preset(DEFAULT_PRESET) if recipe is None else recipe_values(recipe)
    assignments: list[tuple[str, Any]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {override!r}: expected KEY=VALUE, for example --set method.optimizer.lr=1e-4")
        assignments.append((key, _scalar(text, override)))
    for key, value in assignments:
        if key == "method.name":  # first: another method drops the recipe's method section
            values = _merge(values, {"method": {"name": value}})
    for key, value in assignments:
        _assign(values, key.split("."), value)
    return build_config(values)


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-4 as a number, as YAML 1.2 does; in YAML 1.1 it is text."""


_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def recipe_values(recipe: str) -> dict[str, Any]:
    """The values of a preset or of a file, with those of the presets that it builds on."""
    if recipe in preset_names():
        return _preset(recipe)
    if not os.path.isfile(recipe):
        hint = did_you_mean(recipe, preset_names(), kind="the preset ", otherwise="presets:")
        raise UserError(f"recipe {recipe!r} is neither a file nor a preset; {hint}")
    plugins.add_folder(Path(recipe).resolve().parent)  # modules of the user's own lie beside the recipe
    return _built_upon(_yaml(Path(recipe)), [recipe])


def preset_names() -> list[str]:
    """Names of all presets; a file whose name starts with "_" is the base of others and not one itself."""
    return sorted(name for name in _preset_files() if not name.rpartition("/")[2].startswith("_"))


def _preset_files() -> list[str]:
    return [path.relative_to(PRESETS).with_suffix("").as_posix() for path in PRESETS.rglob("*.yaml")]


def _preset(name: str, above: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a preset, or of a base if it is named by one of the recipe and presets `above` it."""
    if name in above:
        raise UserError(f"presets build on each other in a circle: {' -> '.join([*above, name])}")
    if name not in (_preset_files() if above else preset_names()):
        hint = did_you_mean(name, preset_names(), kind="the preset ", otherwise="presets:")
        raise UserError(f"preset {name!r} does not exist; {hint}")
    return _built_upon(_yaml(PRESETS / f"{name}.yaml"), [*above, name])


def _built_upon(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The values merged onto the preset that they name, if any; `names` are the files on the way to them."""
    return _merge(_preset(str(values.pop("preset")), names), values) if "preset" in values else values


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {joined_lines(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} contains {type(values).__name__}, expected keys and values")
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"{path}: key {key!r} is {type(key).__name__}, expected a name")
    return values


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the keys of `top`.

    Sections are merged; arguments (`loss_args`) are one value, and another method name drops the
    base's method section.
    """
    out = dict(base)
    for key, value in top.items():
        old = out.get(key)
        out[key] = value
        if not isinstance(old, Mapping) or not isinstance(value, Mapping) or key.endswith("_args"):
            continue
        if key != "method" or value.get("name", old.get("name")) == old.get("name"):
            out[key] = _merge(dict(old), value)
    return out


def _scalar(text: str, override: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML ({joined_lines(error)})") from error


def _assign(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        values[key] = inner = dict(inner) if isinstance(inner, Mapping) else {}
        values = inner
    values[keys[-1]] = value
