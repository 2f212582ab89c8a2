"""The command that prepares a dataset: published ones as their authors ship them, bad images, clusters."""

from __future__ import annotations

import json
import re
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import evaluate, prepare
from pipeline.data.entries import DISTRACTOR, JUNK
from pipeline.data.store import Store
from pipeline.distributed import ray_session
from pipeline.runs.terminal import show_summary
from pipeline.storage import Folder
from tests.pipeline import shipped
from tests.pipeline.conftest import Base, Cli, pixels, rejected
from tests.pipeline.shipped import made

# ---- published datasets ----------------------------------------------------------------------------------------------

ARGUMENTS = ["--folds", "2", "--images-per-shard", "5"]
SPLITS = {
    **{name: shipped.COUNTS[name] for name in ("cub", "cars", "sop", "inshop")},
    "mars": {
        "train": {"images": 8, "classes": 3, "tracks": 4},
        "query": {"images": 4, "classes": 2, "tracks": 2},
        "gallery": {"images": 8, "classes": 2, "tracks": 4, "distractors": 2, "junk": 2},
    },
    "lpw": {
        "train": {"images": 32, "classes": 4, "tracks": 16},
        "query": {"images": 4, "classes": 2, "tracks": 2},
        "gallery": {"images": 8, "classes": 2, "tracks": 4},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["cub", "cars", "cars devkit", "sop", "inshop", "mars", "lpw"])
def test_a_published_dataset_becomes_a_store(name: str, cli: Cli, tmp_path: Path) -> None:
    kind = name.split()[0]
    status, said = cli(kind, "--from", made(name, tmp_path / "in"), *ARGUMENTS)
    assert status == 0, said
    store = Store(Folder(tmp_path / "home" / "data" / kind))
    store.check_shards()
    assert store.name == store.manifest["source"] == kind and "partial" not in store.manifest
    assert store.manifest["splits"] == SPLITS[kind] and store.manifest["rejected"] == 0
    assert store.protocol == {"mars": "reid", "lpw": "query_gallery", "inshop": "query_gallery"}.get(
        kind, "leave_one_out"
    )
    assert (
        (store.track is not None)
        == (store.camera is not None)
        == (store.frame is not None)
        == (kind in ("mars", "lpw"))
    )
    assert (
        len(store.sample_id)
        == sum(split["images"] for split in SPLITS[kind].values())
        == len(pixels(store, store.sample_id))
    )
    assert [p.name for p in (tmp_path / "home" / "data").iterdir()] == [kind], "what was unpacked is removed"
    assert "PARTIAL" not in said and f"train: {SPLITS[kind]['train']['images']} images" in said


def test_folder_and_archive_give_the_same_store(cli: Cli, bucket: str, tmp_path: Path) -> None:
    root = made("cub", tmp_path / "in")
    archive = shipped.pack(root, tmp_path / "CUB_200_2011.tgz")
    assert cli("cub", "--from", root, *ARGUMENTS)[0] == 0
    status, said = cli(
        "cub", "--from", archive, "--to", f"{bucket}/data/birds", "--scratch", tmp_path / "scratch", *ARGUMENTS
    )
    assert status == 0 and f"unpacking in {tmp_path / 'scratch'}" in said
    there = Store(Folder(f"{bucket}/data/birds"))
    assert there.fingerprint == Store(Folder(tmp_path / "home/data/cub")).fingerprint and there.name == "birds"
    assert not list((tmp_path / "scratch").iterdir())


def test_odd_pictures_are_stored_as_they_look(cli: Cli, tmp_path: Path) -> None:
    assert cli("cub", "--from", made("cub", tmp_path / "in"), *ARGUMENTS)[0] == 0
    store = Store(Folder(tmp_path / "home/data/cub"))
    first = [
        int(i) for i in store.sample_id[np.array([store.class_name_of[int(c)] for c in store.label]) == "099.Gull é"]
    ]
    for image, (_, expected) in zip(pixels(store, first), (odd() for odd in shipped.CUB_ODD.values()), strict=True):
        assert np.abs(image - np.asarray(expected, int)).mean() < 6  # of 255: what JPEG costs; unturned it is above 20


def test_boxes_are_cut_out_before_storing(cli: Cli, tmp_path: Path) -> None:
    root = made("cub", tmp_path / "in")
    lists = root / "CUB_200_2011" / "bounding_boxes.txt"
    lists.write_text(lists.read_text().replace("12 19.0 4.0 40.0 20.0", "12 60.5 -3.0 40.0 20.0"))  # beyond two edges
    assert cli("cub", "--from", root, "--crop", "box", *ARGUMENTS)[0] == 0
    store = Store(Folder(tmp_path / "home/data/cub-box"))
    assert store.manifest["crop"] == "box" and store.title == f"cub-box ({store.fingerprint}, cropped to boxes)"
    images = pixels(store, store.sample_id)
    assert [image.shape[:2] for image in images] == [*[(20, 40)] * 2, (40, 20), *[(20, 40)] * 7, (17, 12), (20, 40)], (
        "the third is turned after it was cut: its box is that of the file"
    )
    whole = np.asarray(shipped.drawing(5), int)
    assert np.abs(images[5] - whole[4:24, 13:53]).mean() < 6


def test_a_box_outside_of_its_image_is_rejected(cli: Cli, tmp_path: Path) -> None:
    root = made("cub", tmp_path / "in")
    lists = root / "CUB_200_2011" / "bounding_boxes.txt"
    lists.write_text(lists.read_text().replace("12 19.0 4.0", "12 72.0 4.0"))
    status, said = cli("cub", "--from", root, "--crop", "box", "--partial", "--max-rejected", "0.1", *ARGUMENTS)
    assert status == 0 and "1 images cannot be read" in said
    (reason,) = rejected(Folder(tmp_path / "home/data/cub-box")).values()
    assert "box (72.0, 4.0, 40.0, 20.0) lies outside the 72 × 72 pixels" in reason


def test_tracklets_distractors_and_junk(cli: Cli, tmp_path: Path) -> None:
    assert cli("mars", "--from", made("mars", tmp_path / "in"), *ARGUMENTS)[0] == 0
    store = Store(Folder(tmp_path / "home/data/mars"))
    names = np.array([store.class_name_of[int(label)] for label in store.label])
    assert store.track is not None and store.camera is not None and store.frame is not None
    assert set(store.label[names == "0000"]) == {DISTRACTOR} == {-1} and set(store.label[names == "00-1"]) == {
        JUNK
    } == {-2}
    assert (store.label[store.split != "gallery"] >= 0).all()
    assert sorted(set(store.track.tolist())) == list(range(10)), "numbered over the whole store"
    tracklets = set()
    for track in range(10):
        rows = np.flatnonzero(store.track == track)
        camera, split = store.camera[rows[0]], store.split[rows[0]]
        tracklets.add((str(names[rows[0]]), int(camera), str(split), tuple(store.frame[rows].tolist())))
    assert tracklets == {
        ("0001", 1, "train", (1, 2)), ("0001", 2, "train", (1, 2, 3)), ("0003", 1, "train", (1,)), ("0005", 6, "train", (1, 2)),
        ("00-1", 1, "gallery", (1, 2)), ("0000", 3, "gallery", (1, 2)), ("0002", 1, "query", (1, 2)), ("0002", 2, "gallery", (1, 2, 3)),
        ("0004", 1, "query", (1, 2)), ("0004", 5, "gallery", (1,)),
    }  # fmt: skip
    both = store.select(["query", "gallery"])
    assert both.class_names == ("0002", "0004") and sorted(set(both.labels.tolist())) == [-2, -1, 0, 1]
    rows = np.searchsorted(store.sample_id, both.ids)
    for own, whole in ((both.tracks, store.track), (both.cameras, store.camera), (both.frames, store.frame)):
        np.testing.assert_array_equal(own, whole[rows])
    for label, row in zip(both.labels, rows, strict=True):
        assert (names[row] == both.class_names[label]) if label >= 0 else (label == store.label[row])
    shard = store.shard_table(store.manifest["shards"][-1])
    assert shard.column_names == [
        "sample_id", "label", "class_name", "split", "track", "camera", "frame", "source", "image",
    ]  # fmt: skip
    train_only = store.select(["train"], without_fold=0)
    assert (
        train_only.tracks is not None and len(train_only.tracks) == len(train_only) and (train_only.labels >= 0).all()
    )


def test_frames_are_in_order_of_time(cli: Cli, tmp_path: Path) -> None:
    """Also where their names sort otherwise: 10 after 9."""
    assert cli("lpw", "--from", made("lpw", tmp_path / "in"), *ARGUMENTS)[0] == 0
    store = Store(Folder(tmp_path / "home/data/lpw"))
    assert store.frame is not None and store.frame.tolist() == [9, 10] * 22


# ---- what is not whole -----------------------------------------------------------------------------------------------


def test_a_partial_dataset_is_refused_unless_it_is_asked_for(cli: Cli, tmp_path: Path) -> None:
    root = made("cub", tmp_path / "in")
    (root / "CUB_200_2011/images/100.Auk/Auk 4.jpg").unlink()
    status, said = cli("cub", "--from", root, *ARGUMENTS)
    assert status == 2 and said.count("\n") == 1 and "train: 5 of 6 images" in said and not (tmp_path / "home").exists()
    status, said = cli("cub", "--from", root, "--partial", *ARGUMENTS)
    store = Store(Folder(tmp_path / "home/data/cub"))
    lacks = ["1 of 12 listed images are missing", "train: 5 of 6 images"]
    assert status == 0 and store.manifest["partial"] == lacks and list(store.partial) == lacks
    assert store.title == f"cub ({store.fingerprint}, PARTIAL)" and store.title in said
    assert all(f"  partial: {sentence}\n" in said for sentence in lacks)


def test_an_image_that_cannot_be_read_is_lacking(cli: Cli, tmp_path: Path) -> None:
    root = made("sop", tmp_path / "in")
    next(root.rglob("10_1.JPG")).write_bytes(b"")
    status, said = cli("sop", "--from", root, *ARGUMENTS)
    assert (
        status == 2 and "1 of 12 images cannot be read, more than 0.0% allowed" in said and "(with --partial)" in said
    )
    status, said = cli("sop", "--from", root, "--partial", *ARGUMENTS)
    assert status == 2 and "more than 1.0% allowed" in said
    status, said = cli("sop", "--from", root, "--partial", "--max-rejected", "0.1", *ARGUMENTS)
    assert status == 0
    assert Store(Folder(tmp_path / "home/data/sop")).partial == ("1 images cannot be read",)


@pytest.fixture
def partial_run(base: Base, tmp_path: Path) -> Folder:
    """A finished run on a dataset whose manifest says that it is not whole."""
    shutil.copytree(base.store.folder.path(), tmp_path / "store")
    store = Folder(tmp_path / "store")
    store.write_json("manifest.json", store.read_json("manifest.json") | {"partial": ["train: 1 of 2 images"]})
    shutil.copytree(base.run.path(), tmp_path / "run")
    run = Folder(tmp_path / "run")
    run.write_json("run.json", run.read_json("run.json") | {"dataset": store.uri})
    return run


def test_evaluation_says_that_the_dataset_is_partial(
    partial_run: Folder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert evaluate.main([partial_run.uri, "--json", str(tmp_path / "metrics.json")]) == 0
    assert "partial dataset: train: 1 of 2 images" in capsys.readouterr().err
    assert json.loads((tmp_path / "metrics.json").read_text())["partial"] == ["train: 1 of 2 images"]
    assert evaluate.main([partial_run.uri, "--embed-to", str(tmp_path / "out"), "--workers", "0"]) == 0
    assert Folder(tmp_path / "out").read_json("_embeddings.json")["partial"] == ["train: 1 of 2 images"]


def test_training_says_that_the_dataset_is_partial(partial_run: Folder, capsys: pytest.CaptureFixture) -> None:
    summary = partial_run.read_json("summary.json")
    show_summary(partial_run)
    assert "partial" not in capsys.readouterr().out
    summary["protocol"]["partial"] = "train: 1 of 2 images"
    partial_run.write_json("summary.json", summary)
    show_summary(partial_run)
    assert "partial dataset: train: 1 of 2 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sop", "--from", "{in}", "--crop", "box"], "Stanford Online Products has no boxes"),
        (
            ["cub", "--from", "{in}"],
            "CUB-200-2011: images.txt, image_class_labels.txt, classes.txt, images/ are missing in",
        ),
        (["sop", "--from", "{in}/nothing.zip"], "does not exist"),
        (["sop", "--from", "{in}", "--max-pixels", "0"], "--max-side and --max-pixels have to be at least 1"),
        (["sop", "--from", "{in}", "--max-side", "0"], "--max-side and --max-pixels have to be at least 1"),
        (["sop", "--from", "{in}", "--folds", "3"], "2 training classes cannot be divided into 3 validation folds"),
        (
            ["sop", "--from", "{zip}", "--max-unpacked", "0.000001"],
            "would exceed the unpacking limit by ",
        ),
        (["sop", "--from", "{zip}", "--max-unpacked", "0"], "--max-unpacked is 0, it has to be above 0"),
        (["sop", "--from", "{zip}", "--scratch", "{zip}/x"], "cannot be used"),
    ],
)
def test_what_is_refused_before_ray_starts(
    arguments: list[str], says: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = made("sop", tmp_path / "in")
    archive = shipped.pack(root, tmp_path / "sop.tgz")
    monkeypatch.setattr(prepare, "ray_session", lambda cpus: pytest.fail("Ray was started"))
    status, said = cli(*(a.format(**{"in": root, "zip": archive}) for a in arguments))
    assert status == 2 and says in said.splitlines()[-1]
    assert not list(tmp_path.glob("home/data/*/manifest.json"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_unpacked_is_removed_when_it_is_stopped(
    number: int, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = shipped.pack(made("sop", tmp_path / "in"), tmp_path / "sop.tgz")
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as a shell's background job does
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    unpacked: list[Path] = []

    def stop(*_: Any, **__: Any) -> None:
        unpacked.extend((tmp_path / "scratch").glob("*/*"))
        signal.raise_signal(number)

    monkeypatch.setattr(prepare, "prepare", stop)
    status, said = cli("sop", "--from", archive, "--scratch", tmp_path / "scratch", "--folds", "2")
    assert status == 130 and "interrupted" in said
    assert unpacked and not list((tmp_path / "scratch").iterdir())
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    signal.signal(signal.SIGINT, ignored)


# ---- several nodes ---------------------------------------------------------------------------------------------------


class TwoNodes:
    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "NodeID": n, "NodeManagerAddress": f"10.0.0.{n}"} for n in "12"]


@pytest.mark.parametrize(
    ("hidden", "says"),
    [
        ("in", r"the images \(.*/in/Stanford.*JPG\) does not exist on the nodes 10.0.0.2"),
        ("scratch", r"the scratch folder \(.*raydml-unpacked.*\) does not exist on the nodes 10.0.0.2"),
        ("out", "--to .*out is not visible on the nodes 10.0.0.2"),
        ("none of them", ""),
    ],
)
def test_nodes_have_to_see_what_they_read_and_write(
    hidden: str, says: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = made("sop", tmp_path / "in")
    source = shipped.pack(root, tmp_path / "in" / "sop.zip") if hidden == "scratch" else str(root)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:1")
    monkeypatch.setattr(prepare, "ray_session", lambda cpus: nullcontext(TwoNodes()))
    seen: list[str] = []

    def sees(ray: Any, node: str, path: str) -> bool:
        assert Path(path).exists()
        seen.append(path)
        return node == "1" or hidden not in Path(path).relative_to(tmp_path).parts[0]

    monkeypatch.setattr(ray_session, "_path_exists_on", sees)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    status, said = cli("sop", "--from", source, "--to", out, "--scratch", scratch, *ARGUMENTS)
    assert (status == 0) == (not says) and seen
    if says:
        assert re.search(says, said.splitlines()[-1]) and not (out / "manifest.json").exists()
        assert "unpacking" not in said, "before anything is unpacked"
