"""The Material icons, drawn from their fonts."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline.data import icons
from pipeline.data.entries import Entry
from pipeline.data.find_store import find_store
from pipeline.data.store import Store
from pipeline.errors import UserError
from tests.pipeline.conftest import Cli


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Entry]]:
    folder = tmp_path_factory.mktemp("icons")
    return folder, icons.draw_icons(folder)


def test_every_icon_has_four_styles(drawn: tuple[Path, list[Entry]]) -> None:
    folder, entries = drawn
    styles: dict[str, list[str]] = {}
    for entry in entries:
        assert entry.source == f"{folder}/{entry.path}" and entry.path is not None
        style, _, file = entry.path.partition("/")
        assert file == f"{entry.class_name}.png"
        styles.setdefault(entry.class_name, []).append(style)
    assert len(styles) == 1982 and all(of_icon == list(icons.FONTS) for of_icon in styles.values())
    assert sum(e.split == "train" for e in entries) == 4 * 991
    assert "alarm" not in styles and "access_alarm" in styles, "one drawing of two names"
    assert "star_border" not in styles and "grade" in styles, "the same in one style only"


def test_no_two_images_are_alike_and_shapes_are_those_of_the_font(drawn: tuple[Path, list[Entry]]) -> None:
    _, entries = drawn
    pixels = {e.path: np.asarray(Image.open(e.source)) for e in entries[:1200]}
    assert {image.shape for image in pixels.values()} == {(72, 72, 3)}
    assert len({image.tobytes() for image in pixels.values()}) == 1200
    for image in pixels.values():
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 1, "something is drawn"
    dark = [image[0, 0].mean() < 140 for image in pixels.values()]
    assert 0.4 < np.mean(dark) < 0.6, "half of the grounds are dark"


def test_the_same_again(drawn: tuple[Path, list[Entry]], tmp_path: Path) -> None:
    folder, entries = drawn
    again = icons.draw_icons(tmp_path)
    assert [(e.path, e.split) for e in again] == [(e.path, e.split) for e in entries]
    for path in ("round/home.png", "sharp/wifi_off.png"):
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes()


def test_fonts_that_are_missing_or_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("tkinter_icons_gmi")
    assert spec is not None and spec.submodule_search_locations
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'raydml\[demo\]'"):
        icons.draw_icons(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(spec.submodule_search_locations[0], copy)
    found = SimpleNamespace(submodule_search_locations=[str(copy)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    (copy / "fonts/MaterialIconsSharp-Regular.otf").write_bytes(b"half a font")
    with pytest.raises(UserError, match=r"no fonts that can be read .*: reinstall tkinter-icons-gmi"):
        icons.draw_icons(tmp_path)


def test_one_command_prepares_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Cli) -> None:
    """With the fonts of the package, of ten icons."""
    names = ["10k", "alarm", "home", "wifi", "star", "search", "mail", "lock", "flag", "cake"]
    spec = importlib.util.find_spec("tkinter_icons_gmi")
    assert spec is not None and spec.submodule_search_locations
    few = tmp_path / "few"
    shutil.copytree(spec.submodule_search_locations[0], few)
    for style in icons.FONTS:
        file = few / f"glyphmap-{style}.json"
        codes = json.loads(file.read_text())
        file.write_text(json.dumps({name: codes[name] for name in names}))
    real = importlib.util.find_spec
    found = SimpleNamespace(submodule_search_locations=[str(few)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "tkinter_icons_gmi" else real(name))
    status, said = cli("icons")
    assert status == 0 and "Apache License 2.0" in said
    store = Store(find_store("icons", [str(tmp_path / "home")]))
    assert store.manifest["source"] == "icons" and len(store.sample_id) == 40
    assert sorted(set(store.class_name_of.values())) == sorted(names)
    assert not list((tmp_path / "home/data").glob(".raydml*")), "the drawings are removed"
