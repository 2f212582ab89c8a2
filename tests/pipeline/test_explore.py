"""`python -m pipeline.explore`: the page of any split, and the files of TensorBoard's projector."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import evaluate, explore
from pipeline.data.entries import Entry
from pipeline.data.reader import RowGroupReader
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.exploration.embedding_sample import EmbeddingSample
from pipeline.exploration.projector import write_projector
from pipeline.storage import Folder
from tests.pipeline.conftest import Base, contents
from tests.pipeline.exploration.test_map_page import map_data

Explore = Callable[..., str]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, fresh_readers: None) -> None:
    """The command would take all cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


@pytest.fixture
def page_of(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture) -> Explore:
    """Runs the command on the finished run, which stays as it was; returns the page."""

    def command(*arguments: str | Path) -> str:
        before = base.files()
        assert explore.main([base.run.uri, "--to", str(tmp_path / "page.html"), *map(str, arguments)]) == 0
        assert capsys.readouterr().out.startswith(f"page: {tmp_path}/page.html\n")
        assert base.files() == before
        return (tmp_path / "page.html").read_text()

    return command


def figures(html: str) -> dict[str, str]:
    """The figures in the page's headline."""
    sentence = re.search('<p class="key">(.*?)</p>', html)
    assert sentence
    return dict(re.findall(r"([\w@-]+) ([\d.]+) %", sentence[1]))


def test_the_test_images_have_the_runs_figures_and_its_reports_map(base: Base, page_of: Explore) -> None:
    html = page_of()
    final = base.run.read_json("summary.json")["final"]
    assert figures(html)["Recall@1"] == f"{final['recall@1']:.1f}"
    report = base.run.read("report.html").decode()
    assert map_data(html) == map_data(report)
    for section in ("classes", "confusions", "labels", "duplicates"):
        parts = [text[text.index(f'<section id="{section}"') :].split("</section>")[0] for text in (html, report)]
        assert parts[0] == parts[1]


@pytest.mark.parametrize(
    ("split", "what"), [("train", "training images"), ("validation", "validation images"), ("all", "images")]
)
def test_other_splits(base: Base, page_of: Explore, split: str, what: str) -> None:
    html = page_of("--split", split)
    store = base.store
    rows = {
        "train": store.split == "train",
        "validation": (store.split == "train") & (store.fold == 0),
        "all": store.split != "",
    }[split]
    data = map_data(html)
    assert data["points"] == rows.sum() and f"<h2>Map of the {what}</h2>" in html
    assert sorted(data["classes"]) == sorted({store.class_name_of[label] for label in store.label[rows].tolist()})
    tested = int((store.split != "train").sum())
    assert f"all {tested:,} test images with all {int((store.split == 'train').sum()):,} training images" in html


def test_the_page_lies_in_the_runs_folder_by_default(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, data in contents(Path(base.run.uri)).items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(data)
    (tmp_path / "run" / "test_embeddings.npz").unlink()  # as runs of earlier versions
    assert explore.main([str(tmp_path / "run"), "--checkpoint", "last"]) == 0
    out, err = capsys.readouterr()
    assert out == f"page: {tmp_path}/run/explore-test.html\n" and "drawing" in err
    assert "checkpoint of step" in (tmp_path / "run" / "explore-test.html").read_text()


def test_another_dataset_is_compared_with_the_runs_training_images(
    base: Base, page_of: Explore, tmp_path: Path
) -> None:
    entries, random = [], np.random.default_rng(0)
    train = base.store.sample_id[base.store.split == "train"][:1]
    scene = Image.open(io.BytesIO(RowGroupReader(base.store).read(train)[0]))
    for index in range(6):
        path = tmp_path / f"{index}.png"
        image = Image.fromarray(random.integers(0, 256, (*scene.size[::-1], 3), np.uint8))
        (scene if index == 3 else image).save(path)
        entries.append(Entry(str(path), f"new {index // 2}", "test"))
    store = write_store("others", entries, Folder(tmp_path / "others"), run_serially, num_folds=2)
    html = page_of("--data", store.folder.uri)
    assert "1 of 6 test images" in html and "another dataset than the run" in html
    assert re.search(rf'class="thumb small +t{train[0]}"', html), "its picture is the training store's"
    assert f".t{train[0]}{{background-image" in html and "identical byte by byte" not in html


def test_files_for_tensorboards_projector(base: Base, page_of: Explore, tmp_path: Path) -> None:
    page_of("--tensorboard", tmp_path / "board")
    board = tmp_path / "board"
    config = (board / "projector_config.pbtxt").read_text()
    named = dict(re.findall(r'(\w+_path): "(.*?)"', config))
    assert named == {"tensor_path": "tensors.tsv", "metadata_path": "metadata.tsv", "image_path": "sprite.png"}
    tensors = np.loadtxt(board / "tensors.tsv", delimiter="\t")
    assert evaluate.main([base.run.uri, "--save", str(tmp_path / "saved")]) == 0
    embeddings = np.load(tmp_path / "saved.embeddings.npy").astype(float)
    np.testing.assert_allclose(tensors, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), atol=1e-6)
    head, *lines = (line.split("\t") for line in (board / "metadata.tsv").read_text().splitlines())
    assert head == ["class", "name", "file", "split", "sample_id"] and {len(line) for line in lines} == {5}
    store = base.store
    ids = store.sample_id[store.split == "test"]
    assert [int(line[4]) for line in lines] == ids.tolist() and {line[3] for line in lines} == {"test"}
    assert [line[0] for line in lines] == [store.class_name_of[label] for label in store.label[store.split == "test"]]
    side = [int(n) for n in re.findall(r"single_image_dim: (\d+)", config)]
    columns = int(np.ceil(np.sqrt(len(ids))))
    sprite = Image.open(board / "sprite.png")
    assert side == [64, 64] and sprite.size == (64 * columns, 64 * -(-len(ids) // columns))


def test_names_cannot_break_the_projectors_files(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(path)
    entries = [Entry(str(path), 'x\ty\r\n"z\u2028', "test"), Entry(str(path), "u+1f600", "test")]
    store = write_store("hostile", entries, Folder(tmp_path / "store"), run_serially, num_folds=2)
    sample = EmbeddingSample(store.sample_id, np.eye(2, dtype=np.float32), 2, "cosine")
    write_projector(sample, store, 'run "1"\n', Folder(tmp_path / "board"))
    lines = (tmp_path / "board" / "metadata.tsv").read_bytes().decode().split("\n")
    assert len(lines) == 4 and {line.count("\t") for line in lines[:3]} == {4}
    assert "u+1f600\tgrinning face\t" in lines[1] + lines[2]
    assert 'tensor_name: "run \\"1\\"\\n"\n' in (tmp_path / "board" / "projector_config.pbtxt").read_text()


def test_a_page_in_object_storage(base: Base, bucket: str, capsys: pytest.CaptureFixture) -> None:
    assert explore.main([base.run.uri, "--to", f"{bucket}/pages/x.html", "--tensorboard", f"{bucket}/board"]) == 0
    assert capsys.readouterr().out.startswith(f"page: {bucket}/pages/x.html\n")
    assert map_data(Folder(f"{bucket}/pages").read("x.html").decode())["points"] > 10
    assert Folder(f"{bucket}/board").names() == ["metadata.tsv", "projector_config.pbtxt", "sprite.png", "tensors.tsv"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "x", "--split", "validation"], "leave out --split validation"),
        (["--to", "page.txt"], "--to page.txt: expected the name of a page, such as out.html"),
        (["--to", "/proc/no/page.html"], "is not writable"),
        (["--tensorboard", "/proc/no"], "is not writable"),
        (["--checkpoint", "3x"], "--checkpoint 3x: expected best, last or one of the steps"),
        (["--data", "no_such"], "no_such"),
    ],
)
def test_bad_input_is_one_line(base: Base, arguments: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    before = base.files()
    assert explore.main([base.run.uri, *arguments]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and says in last and not out and "Traceback" not in err
    assert base.files() == before


def test_a_damaged_image_is_named(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = Store(base.store.folder)
    copy = Folder(tmp_path / "store")
    for name in store.folder.find():
        copy.write(name, store.folder.read(name))
    record = next(shard for shard in store.manifest["shards"] if shard["file"].startswith("shards/test"))
    data = bytearray(copy.read(record["file"]))
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    copy.write(record["file"], bytes(data))
    assert explore.main([base.run.uri, "--data", copy.uri, "--to", str(tmp_path / "x.html")]) == 2
    assert record["file"] in capsys.readouterr().err
