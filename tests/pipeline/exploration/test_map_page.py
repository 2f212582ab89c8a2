"""The map and its neighbouring sections as a parser and a real browser read them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.entries import Entry
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.exploration.embedding_sample import draw_sample
from pipeline.runs.report_page import write_report
from pipeline.storage import Folder
from tests.browser import Browser
from tests.pipeline.runs.page import COLOUR_OF, HOSTILE, Page
from tests.pipeline.runs.test_report_page import make_neighbours, make_run, make_store, train_lines

COLOURS = list(COLOUR_OF)


def embeddings_of(store: Store, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and embeddings of the test images, near their classes' random centres."""
    random = np.random.default_rng(2)
    ids, labels = store.sample_id[store.split == "test"], store.label[store.split == "test"]
    centres = random.normal(size=(labels.max() + 1, 12))
    return ids, labels, (centres[labels] + spread * random.normal(size=(len(ids), 12))).astype("f")


def write_page(run: Folder, store: Store) -> str:
    run.write("test_embeddings.npz", draw_sample(*embeddings_of(store), "cosine").to_bytes())
    write_report(run, store)
    return run.read("report.html").decode()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    run = make_run(tmp_path_factory.mktemp("run"), store, make_neighbours(store), train_lines(5))
    write_page(run, store)
    return run


@pytest.fixture(scope="module")
def page(run: Folder) -> Page:
    return Page(run.read("report.html").decode())


def map_data(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="map-data">(.*?)</script>', html)
    assert found is not None
    return json.loads(found[1])


def test_only_the_maps_own_script_can_run(page: Page) -> None:
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    scripts = re.findall(r"<script>(.*?)</script>", page.html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and policy.endswith(f"script-src 'sha256-{digest}'") and "default-src 'none'" in policy
    kinds = [attrs for tag, attrs in page.tags if tag == "script"]
    assert kinds == [{"type": "application/json", "id": "map-data"}, {}]
    assert "http://" not in page.html and "https://" not in page.html
    assert all(url.startswith(("data:image/jpeg;base64,", "#")) for url in re.findall(r"url\((.*?)\)", page.html))
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]


def test_names_are_text_and_nothing_else(page: Page) -> None:
    data = map_data(page.html)
    assert set(data["classes"]) == set(COLOUR_OF)
    assert "<b>" not in page.html and "b" not in {tag for tag, _ in page.tags}
    for part in ("classes", "confusions"):
        section = page.html[page.html.index(f'<section id="{part}"') :].split("</section>")[0]
        assert "&lt;b&gt;&amp;&quot;x" in section


def test_the_data_of_the_map(page: Page, store: Store) -> None:
    data = map_data(page.html)
    ids, labels, embeddings = embeddings_of(store)

    def column(name: str, kind: str = "<u2") -> np.ndarray:
        return np.frombuffer(base64.b64decode(data[name]), kind)

    assert data["points"] == len(ids) == len(column("labels")) and len(column("places")) == 2 * len(ids)
    assert [data["classes"][i] for i in column("labels")] == [store.class_name_of[label] for label in labels]
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    expected = np.argsort(-cosines, axis=1)[:, : data["k"]]
    assert (column("neighbours").reshape(-1, data["k"]) == expected).all()
    shown = column("cosines", "u1").reshape(expected.shape) / 100 - 1
    np.testing.assert_allclose(shown, np.take_along_axis(cosines, expected, 1), atol=0.0051)
    assert data["files"][0] == "/".join((store.sources(ids[:1]) or [""])[0].split("/")[-2:])
    assert f"Shown: all {len(ids)} test images" in page.text


def test_the_same_run_gives_the_same_page(run: Folder, store: Store, page: Page) -> None:
    assert write_page(run, store) == page.html


def test_a_run_without_embeddings_says_how_to_get_the_map(store: Store, tmp_path: Path) -> None:
    run = make_run(tmp_path, store, make_neighbours(store))
    write_report(run, store)
    html = run.read("report.html").decode()
    assert "<code>raydml explore demo</code>" in html and "<script" not in html and "script-src" not in html
    assert 'id="classes"' in html and 'id="duplicates"' in html  # these need no embeddings


def test_worst_classes_and_confusions(page: Page, store: Store) -> None:
    found = make_neighbours(store)
    label_of = dict(zip(store.sample_id.tolist(), store.label.tolist(), strict=True))
    right: dict[int, list[bool]] = {}
    for query, nearest, relevant in zip(found["query"], found["neighbours"][:, 0], found["relevant"], strict=True):
        if relevant:
            right.setdefault(label_of[int(query)], []).append(label_of[int(nearest)] == label_of[int(query)])
    rows = re.findall(r'<tr data-class="(\d+)">.*?<td>(\d+)</td><td>([\d.]+)</td>', page.html, re.DOTALL)
    assert {int(label): (int(num), float(recall)) for label, num, recall in rows} == {
        label: (len(hits), round(100 * np.mean(hits), 1)) for label, hits in right.items()
    }
    recalls = [float(recall) for _, _, recall in rows]
    assert recalls == sorted(recalls)
    counted = sum(not hit for hits in right.values() for hit in hits)
    items = re.findall(r"<li data-classes=.*?</li>", page.html, re.DOTALL)
    told = [re.search(r"<span>(\d+) of (?:.*; (\d+) of \d+ the other way)?", item) for item in items]
    assert sum(int(t[1]) + int(t[2] or 0) for t in told if t) == counted > 0


@pytest.mark.browser
def test_the_map_answers_pointer_and_keyboard(run: Folder, store: Store, tmp_path: Path) -> None:
    _, labels, _ = embeddings_of(store)
    names = [store.class_name_of[label] for label in labels]
    report = Path(run.uri) / "report.html"
    with Browser(report, tmp_path / "profile") as browser:
        browser.show("#map canvas")

        def place(point: int) -> tuple[float, float]:
            x, y, _, _ = browser.box("#map canvas")
            dx, dy = browser.value(f"placeOf({point})")
            return x + dx, y + dy

        for name in (HOSTILE, "cyan"):
            point = names.index(name)
            browser.move(*place(point))
            browser.wait_for("!tip.hidden")
            hovered = browser.value("state.hovered")  # another point may lie over it
            assert browser.value("document.querySelector('.map-tip strong').textContent") == names[hovered] == name
            x, y, width, height = (round(v) for v in browser.box(".map-tip .tile"))
            pixels = np.asarray(browser.picture().convert("RGB"))[y : y + height, x : x + width].astype(int)
            shown = np.abs(pixels - COLOUR_OF[name]).max(axis=2) < 30
            assert shown.mean() > 0.35, "the picture in the tip is the image's"

        first = names.index("yellow")
        x, y = place(first)
        for kind in ("mousePressed", "mouseReleased"):
            browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        chosen = browser.value("state.chosen")
        listed = browser.value("[...panel.querySelectorAll('button')].map((b) => Number(b.dataset.point))")
        assert names[chosen] == "yellow" and listed == browser.value(f"neighboursOf({chosen})") and len(listed) == 8
        verdicts = browser.value("[...panel.querySelectorAll('button')].map((b) => b.className)")
        assert verdicts == ["right" if names[point] == "yellow" else "wrong" for point in listed]
        browser.click(".map-panel li:nth-child(2) button")
        assert browser.value("state.chosen") == listed[1]

        browser.value("canvas.focus()")
        for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
            before = browser.value("[state.cursor, ...placeOf(state.cursor)]")
            browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
            after = browser.value("[state.cursor, ...placeOf(state.cursor)]")
            if after[0] != before[0]:
                step = np.subtract(after[1:], before[1:])
                axis, sign = {"ArrowRight": (0, 1), "ArrowLeft": (0, -1), "ArrowDown": (1, 1), "ArrowUp": (1, -1)}[key]
                assert step[axis] * sign >= abs(step[1 - axis])
                assert browser.value("said.textContent").startswith(names[after[0]])
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="Enter")
        assert browser.value("state.chosen") == after[0]
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="+")
        assert browser.value("view.scale") == 1.5
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="0")
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
        assert browser.value("[view.scale, state.chosen, panel.querySelectorAll('button').length]") == [1, -1, 0]

        browser.click("#map [type=search]")
        browser.call("Input.insertText", text="MAGenta")
        assert browser.value("document.querySelector('.map-count').textContent") == f"{names.count('magenta')} found"
        browser.click("[name=colouring][value=neighbour]")
        assert browser.value("state.colouring") == "neighbour"
        assert browser.problems == []
        assert [url for url in browser.requests if not url.startswith("data:")] == [report.as_uri()]


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_map_on_a_narrow_screen(run: Folder, store: Store, tmp_path: Path, dark: bool) -> None:
    with Browser(Path(run.uri) / "report.html", tmp_path / "profile", width=390, dark=dark) as browser:
        assert browser.value("document.documentElement.scrollWidth") == 390
        browser.show("#map canvas")
        browser.value("choose(3)")
        assert browser.value("document.documentElement.scrollWidth") == 390
        x, y, width, height = (round(v) for v in browser.box("#map canvas"))
        assert 300 < width <= 390 and 300 < height <= 390
        pixels = np.asarray(browser.picture().convert("RGB"))[y : y + height, x : x + width]
        background = (0x14, 0x17, 0x1B) if dark else (255, 255, 255)
        assert (pixels[2, width // 2] == background).all()
        coloured = np.ptp(pixels.astype(int), axis=2) > 40
        assert coloured.sum() > 31 * 20, "the points"
        assert browser.problems == []


@pytest.mark.browser
def test_print_has_four_pages_at_most(tmp_path: Path) -> None:
    """A page with full lists: 30 classes that are all confused, of pictures that stand in both splits."""
    random = np.random.default_rng(0)
    entries = []
    for index in range(300):
        image = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64), Image.Resampling.NEAREST)
        for split, every in (("test", 1), ("train", 6)):
            if index % every == 0:
                path = tmp_path / f"{split}-{index}.png"
                image.save(path)
                entries.append(Entry(str(path), f"{split} class of a rather long name {index // 10}", split))
    store = write_store("many", entries, Folder(tmp_path / "store"), run_serially, num_folds=2)
    found = make_neighbours(store)
    changes = [{"step": 7, "changes": ["runtime.workers: 1 -> 2"] * 3}]
    lines = [line | {name: 1.0 for name in ("grad_norm", "pairs", "own")} for line in train_lines(30)]
    run = make_run(tmp_path / "run", store, found, lines, changes=changes)
    html = write_page(run, store)
    for part, num in (("classes", 20), ("confusions", 20), ("duplicates", 24)):
        section = html[html.index(f'<section id="{part}"') :].split("</section>")[0]
        assert len(re.findall(r"<(?:tr|li) data-", section)) == num
    with Browser(Path(run.uri) / "report.html", tmp_path / "profile", dark=True) as browser:
        for chosen in (-1, 5):
            browser.value(f"choose({chosen})")
            printed = browser.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)
            assert 3 <= len(re.findall(rb"/Type /Page\b", base64.b64decode(printed["data"]))) <= 4
        assert browser.problems == []
