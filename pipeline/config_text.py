"""The configuration as text: YAML with the meaning of every key, and the JSON Schema of recipes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from methods import METHODS
from methods.config import BaseConfig, Length
from pipeline.config import Config

WIDTH = 110  # characters of a comment's line
HEADER = "# Keys marked * may change when a run is continued; any other changed key makes it another run.\n\n"
LENGTH_SCHEMA = {"type": "string", "pattern": r"^\s*\S+\s+(steps?|epochs?)\s*$", "examples": ["200 steps", "3 epochs"]}


def annotated_yaml(config: Config) -> str:
    """A config as YAML that reads back equal, with each key's meaning above it."""
    return HEADER + "\n".join(_lines(config, config.model_dump(mode="json"), "", False))


def _lines(section: BaseConfig, dumped: Mapping[str, Any], indent: str, runtime: bool) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value, extra = getattr(section, name), field.json_schema_extra
        may_change = runtime or (isinstance(extra, dict) and bool(extra.get("runtime")))
        is_section = isinstance(value, BaseModel) and not isinstance(value, Length)
        meaning = field.description or ((type(value).__doc__ or "").strip().split("\n\n")[0] if is_section else "")
        if meaning:
            text = ("* " if may_change and not is_section else "") + " ".join(meaning.split())
            prefix = f"{indent}# "
            yield from textwrap.wrap(text, WIDTH, initial_indent=prefix, subsequent_indent=prefix)
        if is_section:
            yield f"{indent}{name}:"
            yield from _lines(value, dumped[name], f"{indent}  ", may_change)
        else:  # in flow style, one line; the braces of the mapping around it are cut
            yield indent + yaml.safe_dump({name: dumped[name]}, default_flow_style=True, width=10**9).strip()[1:-1]
        if not indent:
            yield ""


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a recipe file, for editors that check and complete YAML.

    The keys below `method` are those of any one method, so a key of another method is only found where no method has it.
    """
    sections: list[type[BaseModel]] = [Config, *(method.Config for method in METHODS.values())]
    references, schema = models_json_schema([(section, "validation") for section in sections])
    definitions = schema["$defs"] | {"Length": LENGTH_SCHEMA}
    recipe = definitions.pop("Config")
    recipe["properties"]["preset"] = {"type": "string", "description": "preset that the recipe builds on"}
    recipe["properties"]["method"] = {
        "description": "name of the method, or its section",
        "anyOf": [{"enum": list(METHODS)}, *(references[(section, "validation")] for section in sections[1:])],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **recipe,
        "title": "raydml recipe",
        "$defs": definitions,
    }
