"""The service's page in a real browser."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.searching.changes import add_to_index
from pipeline.searching.gate import digest
from pipeline.searching.images import Embedding
from pipeline.searching.index import SearchIndex
from tests.browser import Browser
from tests.pipeline.conftest import Base
from tests.pipeline.searching.conftest import SMALL, InProcess, png

pytestmark = pytest.mark.browser
HOSTILE = '<img src=x onerror="hacked=1"><script>hacked=1</script>'


@pytest.fixture(scope="module")
def named(built: Path, model: EmbeddingModel, tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    """A service whose index has an image of a hostile class name, and asks for a token."""
    root = tmp_path_factory.mktemp("page")
    shutil.copytree(built, root / "index")
    (root / "a.png").write_bytes(png(77))
    add_to_index(root / "index", Embedding(model, threads=1).of_files([str(root / "a.png")], HOSTILE))
    limits = dataclasses.replace(SMALL, token_sha256=digest("secret-of-16-bytes"))
    service = InProcess(SearchIndex(root / "index", model), limits)
    yield service
    service.end()


def choose(browser: Browser, path: Path) -> None:
    """Chooses a file, as a user of the dialogue does."""
    document = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)


def drop(browser: Browser, path: Path) -> None:
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.call("Input.dispatchDragEvent", type=kind, x=600, y=600, data=data)


def press(browser: Browser, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"Tab": 9}[key])


DONE = "!document.body.ariaBusy && document.getElementById('status').textContent.endsWith(' ms')"
SHOWN = "[...document.querySelectorAll('#neighbours img')].filter(i => i.complete && i.naturalWidth > 0).length"


def test_an_image_is_chosen_and_dropped_and_its_neighbours_are_shown(
    served: InProcess, base: Base, tmp_path: Path
) -> None:
    first, second = sorted((base.root / "images").glob("test0[12]/0.png"))
    with Browser(served.url, tmp_path / "profile") as browser:
        browser.wait_for("document.getElementById('about').textContent.includes('images, model done')")
        choose(browser, first)
        browser.wait_for(DONE)
        browser.wait_for(f"{SHOWN} === 10")
        captions = browser.value("[...document.querySelectorAll('#neighbours figcaption')].map(e => e.innerText)")
        assert captions[0].split() == ["test01", "1.000"] and len(captions) == 10
        assert browser.value("document.activeElement.id") == "heading", "the keyboard goes on where the answer is"
        assert browser.value("document.querySelector('#neighbours img').alt") == f"test01, {first}"
        browser.value("document.getElementById('status').textContent = ''")
        drop(browser, second)
        browser.wait_for(DONE)
        assert browser.value("document.querySelector('#neighbours figcaption').innerText").split() == [
            "test02",
            "1.000",
        ]
        browser.value(
            "const k = document.getElementById('k'); k.value = '5'; document.getElementById('status').textContent = ''; "
            "k.dispatchEvent(new Event('change'))"
        )
        browser.wait_for(DONE)
        browser.wait_for(f"{SHOWN} === 5")
        assert not browser.problems
        assert all(url.startswith((served.url, "blob:", "data:")) for url in browser.requests), browser.requests


def test_bad_images_are_told_in_words(served: InProcess, tmp_path: Path) -> None:
    text, large = tmp_path / "text.png", tmp_path / "large.png"
    text.write_text("no image")
    Image.effect_noise((700, 700), 99).save(large)
    with Browser(served.url, tmp_path / "profile") as browser:
        for path, says in ((text, "not an image of a known format"), (large, "larger than 200,000 bytes")):
            choose(browser, path)
            browser.wait_for(f"document.getElementById('status').textContent.includes({says!r})")
            assert browser.value("document.getElementById('results').hidden")


def test_every_control_is_reached_by_the_keyboard_and_has_a_name(served: InProcess, tmp_path: Path) -> None:
    with Browser(served.url, tmp_path / "profile") as browser:
        reached = []
        for _ in range(2):
            press(browser, "Tab")
            reached.append(browser.value("document.activeElement.id"))
        assert reached == ["file", "k"]
        browser.value("document.getElementById('file').focus()")
        assert browser.value("getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid", (
            "focus is seen"
        )
        browser.call("Accessibility.enable")
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        roles = {
            node["role"]["value"]: node.get("name", {}).get("value", "") for node in nodes if not node.get("ignored")
        }
        assert roles["combobox"].startswith("Neighbours") and "Choose an image" in str(roles.values())
        assert browser.value("document.documentElement.lang") == "en" and {"heading", "main", "status"} <= roles.keys()


def test_the_token_is_asked_for_and_hostile_names_stay_text(named: InProcess, tmp_path: Path) -> None:
    image = tmp_path / "q.png"
    image.write_bytes(png(77))
    with Browser(named.url, tmp_path / "profile", dark=True) as browser:
        browser.wait_for("!document.getElementById('token-field').hidden")
        assert browser.value("document.activeElement.id") == "token"
        browser.call("Input.insertText", text="secret-of-16-bytes")
        browser.value("document.getElementById('token').dispatchEvent(new Event('change'))")
        browser.wait_for("document.getElementById('about').textContent.includes('images, model')")
        choose(browser, image)
        browser.wait_for(DONE)
        browser.wait_for(f"{SHOWN} === 10")
        assert browser.value("document.querySelector('#neighbours .class').textContent") == HOSTILE
        assert browser.value("document.querySelectorAll('#neighbours script, #neighbours li img').length") == 10
        assert browser.value("typeof hacked") == "undefined"
        text, ground = (
            browser.value(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
        )
        assert text == "rgb(232, 235, 238)" and ground == "rgb(20, 24, 28)", "dark"
