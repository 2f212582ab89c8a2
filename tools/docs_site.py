"""MkDocs hook: what the documentation site takes from the program itself, and a check that its pages need no other host.

A page may hold these markers, each on a line or in a sentence of its own:

    <!-- config: all -->        every key of a recipe, a section each; `shared`: those of all methods; NAME: those of a method
    <!-- presets: all -->       the names of all presets; NAME: those of a method
    <!-- sweep: all -->         every key of a sweep file, a section each; `shipped`: the sweep files of the program

The pages of the API reference are made from docs/reference/modules.yaml.
"""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # this tree, whatever is installed

from methods import METHODS, MethodConfig  # noqa: E402
from pipeline.config import Config  # noqa: E402
from pipeline.recipes import preset_names  # noqa: E402
from pipeline.tuning.shipped import sweep_file_names, sweep_file_title  # noqa: E402
from pipeline.tuning.sweep_config import FinalConfig, MethodEntry, SweepConfig  # noqa: E402
from pipeline.tuning.sweep_file import MAY_CHANGE  # noqa: E402

MODULES = ROOT / "docs" / "reference" / "modules.yaml"
MARKER = re.compile(r"<!-- (config|presets|sweep): (\w+) -->")
HEAD = "| key | values | default | meaning | may change |\n|---|---|---|---|---|\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the API reference."""
    for name, page in yaml.safe_load(MODULES.read_text(encoding="utf-8")).items():
        content = f"# {page['title']}\n\n{page['intro']}\n\n" + "\n\n".join(f"::: {m}" for m in page["modules"]) + "\n"
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts tables in the place of the markers."""
    tables = {"config": config_tables, "presets": preset_list, "sweep": sweep_tables}
    return MARKER.sub(lambda found: tables[found[1]](found[2]), markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuses a site whose pages would ask another host for anything."""
    problems = [
        f"{path.relative_to(config.site_dir)}: {url}"
        for path in sorted(Path(config.site_dir).rglob("*"))
        if path.suffix in (".html", ".css")
        for url in foreign_requests(path.read_text(encoding="utf-8"), path.suffix)
    ]
    if problems:
        raise PluginError("pages ask other hosts: " + "; ".join(problems[:5]))


# ---- keys of a recipe --------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """A leaf of a config model.

    Attributes:
        name: dotted.
        field: with annotation, default and description.
        runtime: whether it may change when a run is continued.
    """

    name: str
    field: FieldInfo
    runtime: bool


def config_tables(which: str) -> str:
    """Markdown tables of keys: of the whole recipe ("all"), of every method ("shared"), or what one method adds."""
    shared = list(keys(MethodConfig, "method."))
    if which == "shared":
        return table(key for key in shared if key.name != "method.name")
    if which != "all":
        known = {(key.name, str(key.field.default)) for key in shared} | {("method.name", str(which))}
        return table(
            key for key in keys(METHODS[which].Config, "method.") if (key.name, str(key.field.default)) not in known
        )
    out = ["## The run\n\n" + table(key for key in keys(Config) if "." not in key.name)]
    for name, field in Config.model_fields.items():
        section = inner_model(field.annotation)
        if section is not None and name not in ("method", "length"):
            title = (section.__doc__ or "").strip().splitlines()[0]
            mine = (key for key in keys(Config) if key.name.startswith(f"{name}."))
            out.append(f"## {name}\n\n{title}\n\n{table(mine)}")
    return "\n\n".join(out)


def sweep_tables(which: str) -> str:
    """Markdown tables of the keys of sweep files ("all"), or the list of the shipped ones."""
    if which == "shipped":
        return "\n".join(f"- `{name}`: {sweep_file_title(name)}" for name in sweep_file_names())
    fixed = {f"final.{name}" for name in FinalConfig.model_fields} - {"final.seeds"}  # of which more may be added
    every = [
        Key(key.name, key.field, key.name.split(".")[0] in MAY_CHANGE and key.name not in fixed)
        for key in keys(SweepConfig)
    ]
    out = ["## The sweep\n\n" + table(key for key in every if "." not in key.name)]
    out.append("## methods\n\n" + table(keys(MethodEntry, "methods.LABEL.")))
    for name, field in SweepConfig.model_fields.items():
        section = inner_model(field.annotation)
        if section is not None:
            title = (section.__doc__ or "").strip().splitlines()[0]
            mine = (key for key in every if key.name.startswith(f"{name}."))
            out.append(f"## {name}\n\n{title}\n\n{table(mine)}")
    return "\n\n".join(out)


def keys(model: type[BaseModel], prefix: str = "", runtime: bool = False) -> Iterator[Key]:
    """Leaves of a model, in its order; the section of the method is left out."""
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        may_change = runtime or (isinstance(extra, dict) and bool(extra.get("runtime")))
        inner = inner_model(field.annotation)
        if inner is None or is_length(inner):
            yield Key(prefix + name, field, may_change)
        elif not issubclass(inner, MethodConfig):
            if field.description:  # the section can be left out as a whole
                yield Key(prefix + name, field, may_change)
            yield from keys(inner, f"{prefix}{name}.", may_change)


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, alone or as `Model | None`."""
    arguments = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((t for t in arguments if isinstance(t, type) and issubclass(t, BaseModel)), None)


def is_length(model: type[BaseModel]) -> bool:
    """Whether a model is written as one value, "3 epochs"."""
    return set(model.model_fields) == {"value", "unit"}


def table(rows: typing.Iterable[Key]) -> str:
    lines = []
    for key in rows:
        cells = [f"`{key.name}`", values(key.field.annotation), default(key.field), key.field.description or ""]
        lines.append(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in [*cells, "yes" if key.runtime else ""]) + " |"
        )
    return HEAD + "\n".join(lines) if lines else "None of its own."


def values(annotation: Any) -> str:
    """What a key takes, in words."""
    if isinstance(annotation, types.UnionType):
        return " or ".join(values(t) for t in typing.get_args(annotation))
    if typing.get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return values(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (tuple, list):
        inner = [t for t in typing.get_args(annotation) if t is not Ellipsis]
        return f"list of {values(inner[0])}"
    if typing.get_origin(annotation) is dict:
        return "mapping"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "length" if is_length(annotation) else "section"
    return {bool: "true, false", int: "integer", float: "number", str: "text"}.get(annotation, str(annotation))


def default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return f"`{field.get_default(call_default_factory=True)}`"
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, BaseModel) and not is_length(type(value)):
        return "see below"
    if isinstance(value, tuple):
        value = [str(v) if isinstance(v, BaseModel) else round(v, 3) if isinstance(v, float) else v for v in value]
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else ""


def preset_list(which: str) -> str:
    return ", ".join(f"`{name}`" for name in preset_names() if which in ("all", name.split("/")[0]))


# ---- no other host -----------------------------------------------------------------------------------------------

REQUESTS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "link": "href",
}
HARMLESS_LINKS = {"canonical", "prev", "next"}  # told to readers and search engines, not loaded


class _Requests(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in REQUESTS and attributes.get("rel") not in HARMLESS_LINKS:
            self.urls.append(attributes.get(REQUESTS[tag]) or "")


def foreign_requests(text: str, suffix: str) -> list[str]:
    """URLs on other hosts that a browser would load for a page or a style sheet."""
    parser = _Requests()
    if suffix == ".html":
        parser.feed(text)
    loaded = [*parser.urls, *re.findall(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)", text)]
    return [url for url in loaded if re.match(r"(?:https?:)?//", url)]
