"""The command: building from a dataset, from folders, from files of embeddings; query, add, remove, info; bad input."""

from __future__ import annotations

import functools
import io
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import evaluate, search
from pipeline.data.store import Store
from pipeline.inference import load_model
from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.searching.index import open_index
from pipeline.storage import Folder
from tests.pipeline.conftest import Base
from tests.pipeline.searching.conftest import png

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture) -> Command:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = search.main([*map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is loaded once for all commands of this module: it takes most of the time of each."""
    monkeypatch.setattr(load_model, "load_model", _load)


_load = functools.cache(load_model.load_model)


def refused(command: Command, *arguments: object) -> str:
    status, out, err = command(*arguments)
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, (status, out, err)
    return err


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """FOLDER/CLASS/IMAGE, an image in no class, one that cannot be read, and a file that is no image by its name."""
    for number, name in enumerate(["red/a.png", "red/deep/b.png", "blue/c.png", "d.png"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    (tmp_path / "images" / "blue" / "broken.png").write_bytes(png(9)[:200])
    (tmp_path / "images" / "notes.txt").write_text("x")
    return tmp_path / "images"


def test_an_index_of_the_runs_dataset_holds_its_test_images(
    built: Path, base: Base, model: EmbeddingModel, command: Command
) -> None:
    index = open_index(built)
    rows = np.flatnonzero(base.store.split == "test")
    assert len(index) == len(rows)
    sources = base.store.sources(base.store.sample_id[rows])
    assert sources is not None
    for query, number in ((sources[3], 3), (sources[-1], len(rows) - 1)):
        (hits,) = index.search(query, 2)
        assert (hits[0].id, hits[0].path) == (number, query) and hits[0].similarity == pytest.approx(1, abs=1e-6)
        assert hits[0].class_name == base.store.class_name_of[int(base.store.label[rows[number]])]
        assert hits[0].label == int(base.store.label[rows[number]])
        image = Image.open(io.BytesIO(index.thumbnail(number) or b""))
        assert image.format == "JPEG" and image.size == (24, 24)
    embeddings = model.embed([sources[0], sources[5]])
    assert [hits[0].id for hits in index.search(embeddings, 1)] == [0, 5]
    status, out, _ = command("info", built, "--verify", "--json")
    facts = json.loads(out)
    assert status == 0 and facts["images"] == len(rows) and facts["engine"] == "exact"
    assert (facts["model"], facts["fingerprint"]) == (base.run.uri, model.fingerprint)
    assert command("info", built, "--verify")[1].endswith("all checksums are right\n")


def test_an_index_of_embeddings_equals_one_of_the_images(
    built: Path, base: Base, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "out"
    assert evaluate.main([base.run.uri, "--embed-to", str(files), "--workers", "0"]) == 0
    for options in ([], ["--no-thumbnails"]):
        path = tmp_path / f"index{len(options)}"
        assert command("build", base.run.uri, "--embeddings", files, "--to", path, *options)[0] == 0
        first, second = open_index(built), open_index(path)
        queries = np.random.default_rng(0).normal(size=(4, 8))
        (ids, values), (other_ids, other_values) = (i.search_embeddings(queries, 6) for i in (first, second))
        assert np.array_equal(ids, other_ids) and np.abs(values - other_values).max() < 1e-6
        assert first.search(queries, 1)[0][0].path == second.search(queries, 1)[0][0].path
        assert second.thumbnail(4) == (None if options else first.thumbnail(4))
    manifest = json.loads((files / "_embeddings.json").read_text())
    for change, says in (
        ({"weights": {"trunk.safetensors": "0"}}, "are of other weights"),
        ({"complete": False}, "are not complete"),
        ({"fingerprint": "0"}, "not of"),
    ):
        (files / "_embeddings.json").write_text(json.dumps(manifest | change))
        assert says in refused(command, "build", base.run.uri, "--embeddings", files, "--to", tmp_path / "no")
    (files / "_embeddings.json").unlink()
    assert "holds no embeddings" in refused(
        command, "build", base.run.uri, "--embeddings", files, "--to", tmp_path / "no"
    )


def test_images_of_folders_are_built_added_found_and_removed(
    base: Base, images: Path, tmp_path: Path, command: Command
) -> None:
    path = tmp_path / "index"
    status, out, err = command("build", base.run.uri, "--images", images, "--to", path)
    assert status == 0 and out.startswith("4 images in ")
    assert "1 files could not be read" in err and "broken.png: the image is truncated" in err
    index = open_index(path)
    classes = {Path(hit.path).name: hit.class_name for hit in index.search(str(images / "d.png"), 9)[0]}
    assert classes == {"a.png": "red", "b.png": "red", "c.png": "blue", "d.png": None}

    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "e.png").write_bytes(png(4))
    status, out, _ = command("add", path, tmp_path / "more", images / "d.png", "--class", "green", "--json")
    assert (status, {k: json.loads(out)[k] for k in ("added", "replaced")}) == (0, {"added": 2, "replaced": 1})
    status, out, _ = command("query", path, images / "d.png", tmp_path / "more" / "e.png", "-k", 1, "--json")
    found = [
        (answer["query"], answer["neighbours"][0]["path"], answer["neighbours"][0]["class_name"])
        for answer in json.loads(out)
    ]
    assert found == [(str(p), str(p), "green") for p in (images / "d.png", tmp_path / "more" / "e.png")]
    lines = command("query", path, images / "red" / "a.png", "-k", 2)[1].splitlines()
    assert lines[0] == str(images / "red" / "a.png") and lines[1].split() == ["1", "1.0000", "red", lines[0]]

    assert command("remove", path, images / "red")[1].startswith("2 images removed (3 in the index")
    (hits,) = open_index(path).search(str(images / "d.png"), 9)
    assert sorted(Path(hit.path).name for hit in hits) == ["c.png", "d.png", "e.png"]


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_of_a_query_shows_pictures_and_escapes_names(base: Base, tmp_path: Path, command: Command) -> None:
    hostile = '<img src=x onerror="hacked=1">'
    (tmp_path / hostile.replace("/", "")).mkdir()
    image = tmp_path / hostile / "a&b.png"
    image.write_bytes(png())
    path = tmp_path / "index"
    assert command("build", base.run.uri, "--images", tmp_path, "--to", path)[0] == 0
    assert command("query", path, image, "--html", tmp_path / "found.html")[0] == 0
    page = Page((tmp_path / "found.html").read_text())
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 2 and all(p["src"].startswith("data:image/jpeg;base64,") for p in pictures)
    assert pictures[1]["alt"] == f"{hostile}, {image}"
    assert not [tag for tag, _ in page.tags if tag == "script"]
    (policy,) = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv")]
    assert "default-src 'none'" in policy and "script-src" not in policy


def test_another_model_is_refused(
    built: Path, base: Base, tmp_path: Path, command: Command, model: EmbeddingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(png())
    shutil.copytree(base.run.path(), tmp_path / "other")
    shutil.copytree(built, tmp_path / "index")
    assert command("query", tmp_path / "index", image, "--model", tmp_path / "other")[0] == 0, (
        "the same weights elsewhere"
    )
    manifest = json.loads((tmp_path / "index" / "index.json").read_text())
    for change, says in (
        ({"model": manifest["model"] | {"fingerprint": "f" * 64}}, "was built by another model"),
        ({"dim": 9}, "has 9 dimensions, the model"),
        ({"model": manifest["model"] | {"source": "/no/such/run"}}, "is neither a run"),
    ):
        (tmp_path / "index" / "index.json").write_text(json.dumps(manifest | change))
        for arguments in (["query", tmp_path / "index", image], ["add", tmp_path / "index", image]):
            assert says in refused(command, *arguments)


def test_bad_input_is_one_line(built: Path, base: Base, images: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    text = tmp_path / "text.jpg"
    text.write_text("some text")
    run, new = base.run.uri, tmp_path / "new"
    wide = tmp_path / "wide.png"
    Image.new("1", (40_000, 25_000)).save(wide)
    for arguments, says in (
        (["build", run, "--images", tmp_path / "empty", "--to", new], "has no images"),
        (["build", run, "--images", tmp_path / "bad", "--to", new], "none of 1 images can be read"),
        (["build", run, "--images", tmp_path / "nowhere", "--to", new], "there is no such file"),
        (["build", run, "--to", built], "holds an index already"),
        (["build", run, "--to", "s3://bucket/index"], "has to lie in a local folder"),
        (["build", run, "--images", images, "--split", "all", "--to", new], "--split goes with"),
        (["build", "no_such_run", "--to", new], "is neither a run"),
        (["build", run, "--checkpoint", "99999", "--to", new], "expected best, last or one of the steps"),
        (["build", run, "--to", new, "--threads", "0"], "--threads is 0"),
        (["query", built, text], "text.jpg: a text file, not an image"),
        (["query", built, tmp_path / "nowhere.jpg"], "nowhere.jpg: there is no such file"),
        (["query", built, wide], "40000 × 25000 pixels"),
        (["query", built, images, "-k", "0"], "-k is 0"),
        (["query", tmp_path, images], "holds no index"),
        (["query", built, images / "d.png", "--html", tmp_path / "no" / "x.html"], "cannot be written"),
        (["add", tmp_path, images], "holds no index"),
        (["add", built, text], "text.jpg: a text file"),
        (["remove", built, "/no/such.jpg"], "/no/such.jpg is not in the index"),
        (["info", "s3://bucket/index"], "has to lie in a local folder"),
    ):
        assert says in refused(command, *arguments), arguments
    assert not new.exists() or not [name for name in Folder(new).names() if name != ".lock"]


def test_splits_are_chosen(base: Base, tmp_path: Path, command: Command) -> None:
    assert command("build", base.run.uri, "--split", "all", "--to", tmp_path / "index", "--no-thumbnails")[0] == 0
    assert len(open_index(tmp_path / "index")) == len(Store(base.store.folder).sample_id)
