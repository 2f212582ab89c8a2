"""Recipes: a preset, a YAML file and `--set a.b=c`, merged into a configuration."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.errors import UserError, did_you_mean, joined_lines

if TYPE_CHECKING:
    from pipeline.config import Config

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "baseline/emoji"
AUTO = "auto"  # the value of `name` that is replaced by a name made from the settings


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what every command with a recipe takes: `recipe`, and `--set` as `overrides`."""
    parser.add_argument("recipe", nargs="?", help="YAML file or preset name (default: the built-in demo)")
    add_set_argument(parser, "the recipe", "seed=1")


def add_set_argument(parser: argparse.ArgumentParser, of: str, example: str) -> None:
    """Adds `--set KEY=VALUE` as `overrides`."""
    help = f"sets a key of {of}, e.g. {example}; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=help)


def add_name_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the name of a run or a sweep that is there, and the storage that it is looked up in."""
    parser.add_argument("name", metavar="NAME", help="name of a run or a sweep, or its folder or s3:// URI")
    parser.add_argument(
        "--storage", default="", metavar="URI", help="where names are looked up (default: as in a recipe)"
    )


def load_config(recipe: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe and applies overrides.

    Args:
        recipe: A YAML file or the name of a preset ("baseline/emoji"); the default preset if None.
            A file may build on a preset with the key `preset`, as presets do on each other.
        overrides: "a.b=c" each; c is read as YAML.

    Raises:
        UserError: One line a problem, naming the key, what was got and what was expected.
    """
    return resolve(read_recipe(recipe, overrides), recipe)


def resolve(values: Mapping[str, Any], recipe: str | None) -> Config:
    """The checked configuration of the values that `read_recipe` has read; `name: auto` becomes a name.

    An automatic name is that of the preset that the recipe is or builds on (else that of the file) and the keys that
    differ from it, so that the same settings have the same name.

    Raises:
        UserError: One line a problem, as `load_config`.
    """
    from methods import plugins  # here: with the methods and the config comes PyTorch
    from pipeline.config import build_config, changed_keys, name_for

    plugins.add_folder(os.getcwd())
    if recipe is not None and os.path.isfile(recipe):
        plugins.add_folder(Path(recipe).resolve().parent)  # modules of the user's own lie beside the recipe

    if str(values.get("name")).lower() != AUTO:
        return build_config(values)
    config = build_config({**values, "name": AUTO})
    preset = DEFAULT_PRESET if recipe is None else recipe if recipe in preset_names() else _named_preset(recipe)
    base = build_config(_preset(preset) if preset else {})
    changes = changed_keys(base.model_dump(mode="json"), config.model_dump(mode="json"), runtime=False)
    changes.pop("name", None)
    name = base.name if preset else re.sub(r"[^A-Za-z0-9._-]+", "-", Path(recipe or "").stem).strip("-._") or "run"
    return config.model_copy(update={"name": name_for(name, {key: new for key, (_, new) in changes.items()})})


def read_recipe(recipe: str | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """As `load_config`, without the check of keys and values.

    Raises:
        UserError: The recipe does not exist or is not YAML, or an override is not "a.b=c".
    """
    values = _preset(DEFAULT_PRESET) if recipe is None else recipe_values(recipe)
    return assigned(values, [parse_override(override) for override in overrides])


def assigned(values: Mapping[str, Any], assignments: Sequence[tuple[Sequence[str], Any]]) -> dict[str, Any]:
    """The values with some keys set, in any order: another method drops the method section, another loss its arguments.

    Args:
        values: A recipe's values.
        assignments: Parts of each dotted key, and its value.
    """
    out = dict(values)
    for keys, value in assignments:  # first: what is dropped may be set anew
        out = merged(out, _nested(keys, value)) if _has_arguments(out, keys) else out
    for keys, value in assignments:
        _assign(out, keys, value)
    return out


def parse_override(override: str) -> tuple[list[str], Any]:
    """Keys and value of "a.b=c".

    Raises:
        UserError: There is no key or no value, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: expected KEY=VALUE, for example --set method.optimizer.lr=1e-4")
    return parse_keys(key), _scalar(text, override)


def parse_keys(key: str) -> list[str]:
    """The parts of a dotted key."""
    return key.strip().split(".")


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if len(keys) > 1 else value}


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-4 as a number, as YAML 1.2 does; in YAML 1.1 it is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As YAML's, but a key that stands twice is an error: the first of its values would be lost without a word."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen and key_node.value != "<<":
                raise yaml.MarkedYAMLError(None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark)
            if isinstance(key_node, yaml.ScalarNode):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def recipe_values(recipe: str) -> dict[str, Any]:
    """The values of a preset or of a file, with those of the presets that it builds on."""
    if recipe in preset_names():
        return _preset(recipe)
    if os.path.isdir(recipe):
        raise UserError(
            f"recipe {recipe!r} is a folder, expected a YAML file or the name of a preset. To train on the images in a folder, "
            f"prepare them (python -m pipeline.prepare folder {recipe}) and set data.source"
        )
    if not os.path.isfile(recipe):
        raise UserError(_missing(recipe))
    return _built_upon(read_yaml(Path(recipe)), [recipe])


def _missing(recipe: str) -> str:
    """What to say of a recipe that is neither a file nor a preset."""
    if "=" in recipe:
        return f"recipe {recipe!r} is neither a file nor a preset; a key is set by --set {recipe}"
    if recipe.endswith((".yaml", ".yml")):
        folder = os.path.dirname(recipe) or "."
        files = (
            [name for name in os.listdir(folder) if name.endswith((".yaml", ".yml"))] if os.path.isdir(folder) else []
        )
        there = [os.path.normpath(os.path.join(folder, name)) for name in sorted(files)]
        hint = did_you_mean(recipe, there, otherwise="the YAML files there:") if there else "no YAML file is there"
        return f"there is no file {recipe!r} in {os.path.abspath(folder)}: {hint}"
    hint = did_you_mean(recipe, preset_names(), kind="the preset ", otherwise="presets:")
    return f"recipe {recipe!r} is neither a file nor a preset; {hint}"


def _named_preset(recipe: str) -> str | None:
    """The preset that a file builds on."""
    name = read_yaml(Path(recipe)).get("preset")
    return None if name is None else str(name)


def preset_names() -> list[str]:
    """Names of all presets; a file whose name starts with "_" is the base of others and not one itself."""
    return sorted(name for name in _preset_files() if not name.rpartition("/")[2].startswith("_"))


def preset_title(name: str) -> str:
    """The first sentence of the comment that a preset's file begins with; "" if it begins with none."""
    return title_of(PRESETS / f"{name}.yaml")


def title_of(path: Path) -> str:
    """The first sentence of the comment that a YAML file begins with; "" if it begins with none."""
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).split(". ")[0].rstrip(".")


def _preset_files() -> list[str]:
    return [path.relative_to(PRESETS).with_suffix("").as_posix() for path in PRESETS.rglob("*.yaml")]


def _preset(name: str, above: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a preset, or of a base if it is named by one of the recipe and presets `above` it."""
    if name in above:
        raise UserError(f"presets build on each other in a circle: {' -> '.join([*above, name])}")
    if name not in (_preset_files() if above else preset_names()):
        hint = did_you_mean(name, preset_names(), kind="the preset ", otherwise="presets:")
        raise UserError(f"preset {name!r} does not exist; {hint}")
    return _built_upon(read_yaml(PRESETS / f"{name}.yaml"), [*above, name])


def _built_upon(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The values merged onto the preset that they name, if any; `names` are the files on the way to them."""
    return merged(_preset(str(values.pop("preset")), names), values) if "preset" in values else values


def read_yaml(path: Path, example: str = f"`preset: {DEFAULT_PRESET}` to build on one") -> dict[str, Any]:
    """The keys and values of a YAML file; `example` is shown where it is empty.

    Raises:
        UserError: The file cannot be read, is not YAML, or has no keys and values.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {joined_lines(error)}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if values is None:
        raise UserError(f"{path} is empty: write keys and values, for example {example}")
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else f"a single value ({values!r:.40})"
        raise UserError(f"{path} contains {kind}, expected keys and values such as `seed: 1`")
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"{path}: key {key!r} is {type(key).__name__}, expected a name")
    return values


def merged(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the keys of `top`.

    Sections are merged; arguments (`loss_args`) are one value, and another method name drops the
    base's method section. Another loss, miner or backbone drops what belongs to the base's.
    """
    out = dict(base)
    for key, value in top.items():
        old = out.get(key)
        if key in base and old != value:
            for dependent in _dependents(key, base):
                out.pop(dependent, None)
        out[key] = value
        if not isinstance(old, Mapping) or not isinstance(value, Mapping) or key.endswith("_args"):
            continue
        if key != "method" or value.get("name", old.get("name")) == old.get("name"):
            out[key] = merged(dict(old), value)
    return out | {key: top[key] for key in top if key not in out}


def _dependents(key: str, section: Mapping[str, Any]) -> list[str]:
    """Keys of a section that belong to the value of another: a loss's arguments, a backbone's weight file and pixel statistics."""
    if key == "backbone":
        keeps_weights = str(section.get("weights", "pretrained")).lower() in ("pretrained", "none")
        return ["backbone_args", "mean", "std", *([] if keeps_weights else ["weights"])]
    return [f"{key}_args"]


def _has_arguments(values: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """True if another value of a key drops others: that of the method, or a key that has dependents."""
    if list(keys) == ["method", "name"]:
        return True
    section: Any = values
    for key in keys[:-1]:
        section = section.get(key) if isinstance(section, Mapping) else None
    return isinstance(section, Mapping) and any(key in section for key in _dependents(keys[-1], section))


def _scalar(text: str, override: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML ({joined_lines(error)})") from error


def _assign(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for i, key in enumerate(keys[:-1]):
        inner = values.get(key)
        if isinstance(inner, str) and keys[0] == key == "method":
            inner = {"name": inner}
        if not isinstance(inner, Mapping) and inner is not None and str(inner).lower() not in ("none", "null"):
            raise UserError(
                f"{'.'.join(keys)} cannot be set: {'.'.join(keys[: i + 1])} is {inner!r}, expected keys and values"
            )
        values[key] = inner = dict(inner) if isinstance(inner, Mapping) else {}
        values = inner
    values[keys[-1]] = value
