"""What the documentation says is so: links, paths, presets, commands, keys and modules exist, and its examples run."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from methods import METHODS
from pipeline import train
from pipeline.data.store import Store
from pipeline.recipes import load_config, preset_names
from pipeline.tuning.checks import check_sweep
from pipeline.tuning.sweep_file import load_sweep

ROOT = Path(__file__).parent.parent.parent
DOCS, EXAMPLES = ROOT / "docs", ROOT / "docs" / "examples"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    (?=\S)(.*)$", re.MULTILINE)
QUOTED = re.compile(r"`([^`\n]+)`")
FROM_TUTORIAL = re.compile(r"supcon|photos|glyphs")  # files that the reader makes, or the examples of the tutorials
GENERATED = set(yaml.safe_load((DOCS / "reference" / "modules.yaml").read_text()))
MODULES = sorted(
    {m for page in yaml.safe_load((DOCS / "reference" / "modules.yaml").read_text()).values() for m in page["modules"]}
    | {m for page in DOCS.rglob("*.md") for m in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)}
)


SWEEP = re.compile(r"^(methods|space):", re.MULTILINE)  # keys that no recipe has


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def command_lines() -> Iterator[tuple[str, str]]:
    """(page, line) of every line of a shell block or an indented block, without its comment."""
    for page in PAGES:
        text = page.read_text()
        blocks = [body for language, body in FENCE.findall(text) if language in ("", "bash")]
        for line in [*INDENTED.findall(FENCE.sub("", text)), *(line for b in blocks for line in b.splitlines())]:
            yield name_of(page), re.sub(r"\s+#.*", "", line).strip()


COMMANDS = sorted({(page, line) for page, line in command_lines() if "-m pipeline." in line})


def recipes() -> Iterator[tuple[str, str]]:
    """(page, text) of every YAML block that is a whole recipe."""
    for page in PAGES:
        for language, body in FENCE.findall(page.read_text()):
            if language == "yaml" and re.search(r"^name:", body, re.MULTILINE) and not SWEEP.search(body):
                yield name_of(page), body


def sweeps() -> Iterator[tuple[str, str]]:
    """(page, text) of every YAML block that is a whole sweep file, or the search space of one."""
    for page in PAGES:
        for language, body in FENCE.findall(page.read_text()):
            if language == "yaml" and SWEEP.search(body):
                yield name_of(page), body


# ---- names -------------------------------------------------------------------------------------------------------


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_citation_and_changelog_tell_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    assert re.search(rf"^## \[{version}\]|^What will be {version},", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    missing = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        path = target.split("#")[0]
        is_generated = Path(path).stem in GENERATED and (page.parent / path).resolve().parent == DOCS / "reference"
        if path and "://" not in path and not is_generated and not (page.parent / path).exists():
            missing.append(target)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_and_presets_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    missing = []
    for quoted in QUOTED.findall(FENCE.sub("", text)):
        path = re.match(r"(?:methods|pipeline|tests|docs|benchmarks|tools)/[\w./-]*", quoted)
        if path and not FROM_TUTORIAL.search(quoted) and not (ROOT / path[0]).exists():
            missing.append(quoted)
        preset = re.fullmatch(r"(\w+)/(\w+)", quoted)
        known = preset is not None and preset[1] in METHODS
        if known and quoted not in preset_names():
            missing.append(quoted)
    assert not missing


def test_files_of_the_reading_list_exist() -> None:
    rows = re.findall(r"^\| `([\w/]+/)` \| (.*) \|$", (DOCS / "reading-the-code.md").read_text(), re.MULTILINE)
    named = [f"{folder}{file}" for folder, text in rows for file in re.findall(r"`(\w+\.py)`", text)]
    assert len(named) > 40 and [path for path in named if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("module", MODULES)
def test_modules_of_the_reference_can_be_imported(module: str) -> None:
    assert (importlib.import_module(module).__doc__ or "").strip(), f"{module} has no docstring"


def test_programs_that_are_named_exist() -> None:
    named = {m for page in PAGES for m in re.findall(r"python -m ((?:pipeline|benchmarks)\.\w+)", page.read_text())}
    assert {"pipeline.train", "pipeline.prepare", "benchmarks.mining"} <= named
    assert [m for m in sorted(named) if importlib.util.find_spec(m) is None] == []


def test_targets_of_make_that_are_named_exist() -> None:
    named = {
        t
        for page in PAGES
        for t in re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b(?=[`\s]*(?:[`#|]|ARGS|$|&&))", page.read_text())
    }
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"train", "test", "docs"} <= named and named <= targets


# ---- commands and recipes ----------------------------------------------------------------------------------------


class Parsed(Exception):
    """Carries the options of a command whose arguments were accepted."""


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda value: value[:60])
def test_commands_are_accepted(page: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Arguments are parsed by the program itself; recipes and `--set` of training make a valid config."""
    words = shlex.split(line)
    at = words.index("-m") + 1
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> None:
        raise Parsed(parse(parser, arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(words[at]).main(words[at + 1 :])
    options: Any = parsed.value.args[0]
    if words[at] == "pipeline.tune" and "SWEEP" not in options.sweep:
        load_sweep(str(ROOT / options.sweep) if options.sweep.endswith(".yaml") else options.sweep, options.overrides)
    if words[at] == "pipeline.train" and options.recipe:
        register_supcon(monkeypatch)
        load_config(recipe_file(options.recipe, tmp_path), options.overrides)


def recipe_file(name: str, tmp_path: Path) -> str:
    """A recipe that a page names: a preset, a file of the tree, or one that another of its blocks shows."""
    shown = {
        "photos.yaml": r"^# photos.yaml",
        "glyphs.yaml": r"^name: glyphs$",
        "supcon/emoji": r"^name: supcon-emoji$",
    }
    shown["recipe.yaml"] = shown["photos.yaml"]
    if name not in shown:
        return str(ROOT / name) if name.endswith(".yaml") else name
    body = next(body for _, body in recipes() if re.search(shown[name], body, re.MULTILINE))
    (tmp_path / "recipe.yaml").write_text(body)
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(("page", "body"), list(recipes()), ids=lambda value: value[:30])
def test_recipes_are_valid(page: str, body: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register_supcon(monkeypatch)
    (tmp_path / "recipe.yaml").write_text(body)
    assert load_config(str(tmp_path / "recipe.yaml")).name in body


@pytest.mark.parametrize(("page", "body"), list(sweeps()), ids=lambda value: value[:30])
def test_sweep_files_are_valid(page: str, body: str, tmp_path: Path) -> None:
    methods = "" if re.search(r"^methods:", body, re.MULTILINE) else "methods: {margin: {recipe: baseline/emoji}}\n"
    (tmp_path / "sweep.yaml").write_text(f"{methods}{body}")
    sweep = load_sweep(str(tmp_path / "sweep.yaml"), [f"storage={tmp_path}", "budget.trials=9"])
    assert check_sweep(sweep, weights=False) == {}


def test_keys_that_are_named_exist() -> None:
    """`section.key` in prose, for the sections of a recipe but the method's, whose keys depend on its name."""
    sections = {"data", "model", "mining", "evaluation", "checkpoint", "cache", "runtime"}
    file_endings = ("py", "json", "onnx", "pt2", "safetensors")  # model.json and so on
    dumped = load_config("baseline/emoji").model_dump()
    wrong = []
    for page in PAGES:
        for quoted in QUOTED.findall(FENCE.sub("", page.read_text())):
            found = re.fullmatch(r"(?:--set )?(\w+)\.(\w+)(?:[=:].*)?", quoted)
            if found and found[1] in sections and found[2] not in (*dumped[found[1]], *file_endings):
                wrong.append((name_of(page), quoted))
    assert not wrong


# ---- examples ----------------------------------------------------------------------------------------------------


def load(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of the examples, as the module that it becomes in the reader's tree."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def register_supcon(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The first two steps of the tutorial: the file, and the line in METHODS."""
    module = load("methods.supcon", EXAMPLES / "supcon.py", monkeypatch)
    monkeypatch.setitem(METHODS, "supcon", module.SupCon)
    return module


@pytest.mark.parametrize(
    ("page", "example"),
    [
        ("CONTRIBUTING.md", "supcon.py"),
        ("docs/tutorials/own-method.md", "supcon.py"),
        ("docs/tutorials/own-method.md", "test_supcon.py"),
        ("docs/tutorials/own-method.md", "supcon.yaml"),
        ("docs/tutorials/own-images.md", "glyphs.yaml"),
    ],
)
def test_pages_show_the_examples_that_are_tested(page: str, example: str) -> None:
    blocks = [body for _, body in FENCE.findall((ROOT / page).read_text())]
    assert (EXAMPLES / example).read_text() in blocks


def test_the_example_method_passes_its_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    module = register_supcon(monkeypatch)
    tests = load("tests.methods.test_supcon", EXAMPLES / "test_supcon.py", monkeypatch)
    cases = [value for name, value in vars(tests).items() if name.startswith("test_")]
    assert len(cases) == 3
    for case in cases:
        case()
    z = tests.embeddings()
    monkeypatch.setattr(tests, "supcon_loss", lambda x, labels, t: module.supcon_loss(x, labels, t) * 1.001)
    with pytest.raises(AssertionError):
        tests.test_supcon_equals_loops_over_pairs()
    assert torch.isfinite(module.supcon_loss(z, tests.LABELS, 0.01))


TINY = {
    "model.backbone": "test_efficientnet",
    "model.weights": "none",
    "data.transforms.size": 24,
    "method.classes_per_batch": 4,
    "method.samples_per_class": 3,
    "runtime.workers": 0,
    "runtime.loader": "in_process",
    "runtime.cpus_per_worker": 1,
}


def run_tiny(recipe: Path, store: Store, root: Path, **changes: Any) -> int:
    settings = TINY | {"storage": root, "data.source": store.folder.uri} | changes
    return train.main([str(recipe), *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))])


def test_the_example_method_trains(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_supcon(monkeypatch)
    assert run_tiny(EXAMPLES / "supcon.yaml", store, tmp_path, length="3 steps") == 0
    summary = yaml.safe_load((tmp_path / "runs" / "supcon-emoji" / "summary.json").read_text())
    assert summary["protocol"]["method"] == "supcon" and summary["step"] == 3
    assert (tmp_path / "runs" / "supcon-emoji" / "report.html").is_file()


def test_the_tutorial_of_own_images(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images are drawn, and its recipe trains."""
    glyphs = load("glyphs", EXAMPLES / "glyphs.py", monkeypatch)
    glyphs.write(tmp_path / "glyphs", classes=3, images=2)
    paths = sorted((tmp_path / "glyphs").glob("*/*.png"))
    assert len(paths) == 6 and len({p.read_bytes() for p in paths}) == 6
    assert all(Image.open(p).size == (64, 64) for p in paths)
    assert run_tiny(EXAMPLES / "glyphs.yaml", store, tmp_path, length="2 steps", **{"evaluation.every": "1 steps"}) == 0
    assert "best" in (tmp_path / "runs" / "glyphs" / "report.html").read_text()
