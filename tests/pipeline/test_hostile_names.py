"""Names of classes, files and folders that are markup: a page shows them as text, a terminal prints them as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import compare, evaluate, show_list, train
from pipeline.data.entries import Entry
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.runs.records import find_run
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values, write_images
from tests.pipeline.runs.page import Page

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "a\"b'c onload=alert(1)",
    "[red]shoes[/red] [/nothing] :cat:",
    "&lt;b&gt;<!-- ",
]


@pytest.fixture
def hostile_store(tmp_path: Path) -> Store:
    """A dataset whose folder, classes and files have such names; one class has a single image."""
    images = write_images(tmp_path / "images", {f"class{i}": 4 for i in range(12)} | {"lonely": 1}, seed=0)
    entries = []
    for i, (path, folder) in enumerate(images):
        number = 12 if folder == "lonely" else int(folder.removeprefix("class"))
        hostile = HOSTILE[number % len(HOSTILE)]
        copied = tmp_path / "copied" / f"{i} {hostile.replace('/', '_')}.png"
        copied.parent.mkdir(exist_ok=True)
        copied.write_bytes(Path(path).read_bytes())
        entries.append(Entry(str(copied), f"{hostile} {number}", "test" if number in range(5, 10) else "train"))
    return write_store(HOSTILE[0], entries, Folder(tmp_path / "<b onclick=alert(1)>[red]"), run_serially, num_folds=2)


def test_a_run_of_hostile_names(
    hostile_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("RAYDML_HOME", str(tmp_path / "storage"))
    changes = {
        "method.classes_per_batch": 2,
        "method.samples_per_class": 2,
        "length": "2 steps",
        "data.validation_fold": 0,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_values(str(tmp_path / "storage"), hostile_store.folder.uri, changes)))
    assert train.main([str(recipe)]) == 0
    said = capsys.readouterr()
    lonely = f"{HOSTILE[12 % len(HOSTILE)]} 12"
    assert lonely in said.err, "the class of one image, as it is"
    html = (tmp_path / "storage" / "runs" / "tiny" / "report.html").read_text()
    check_page(html, plain_page(tmp_path))
    text = Page(html).text
    assert all(f"{name} {5 + i}" in html_texts(html) or name in text for i, name in enumerate(HOSTILE))
    run = find_run("tiny")
    assert run.exists("report.html")
    for command, arguments in (
        (evaluate.main, ["tiny", "--per-class"]),
        (show_list.main, ["runs"]),
        (compare.main, ["tiny", "tiny"]),
    ):
        status = run_command(command, arguments)
        out = capsys.readouterr()
        assert status in (0, 2) and "Traceback" not in out.err


def run_command(command: Callable[..., int], arguments: list[str]) -> int:
    try:
        return command(arguments)
    except SystemExit as stopped:
        return int(stopped.code or 0)


def html_texts(html: str) -> str:
    """All attribute values and the text of a page, unescaped."""
    page = Page(html)
    return page.text + " ".join(value for _, attributes in page.tags for value in attributes.values())


def plain_page(root: Path) -> Page:
    """The same run of a dataset of harmless names."""
    images = write_images(root / "plain", {f"class{i}": 4 for i in range(12)} | {"lonely": 1}, seed=0)
    entries = [
        Entry(path, name, "test" if name in {f"class{i}" for i in range(5, 10)} else "train") for path, name in images
    ]
    store = write_store("plain", entries, Folder(root / "plain_store"), run_serially, num_folds=2)
    changes: dict[str, Any] = {"method.classes_per_batch": 2, "method.samples_per_class": 2, "length": "2 steps"}
    recipe = root / "plain.yaml"
    recipe.write_text(yaml.safe_dump(tiny_values(str(root / "plain_storage"), store.folder.uri, changes)))
    assert train.main([str(recipe)]) == 0
    return Page((root / "plain_storage" / "runs" / "tiny" / "report.html").read_text())


def check_page(html: str, plain: Page) -> None:
    """The page has the kinds of tags and attributes that one of harmless names has, and the same scripts."""
    page = Page(html)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert {name for _, attributes in page.tags for name in attributes} == {
        name for _, attributes in plain.tags for name in attributes
    }
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert html.count("<script") == plain.html.count("<script")
