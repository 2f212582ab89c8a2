"""What a store holds beside images and classes: tracklets, cameras, frames, images of no class, and how it is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.entries import Entry
from pipeline.data.store import Store
from pipeline.data.write_store import plan_shards, write_store
from pipeline.distributed.jobs import run_serially
from pipeline.errors import UserError
from pipeline.storage import Folder
from pipeline.testing.tiny import write_images


def tracked(root: Path) -> list[Entry]:
    """Two training classes, one queried; the gallery has one of its images, a distractor and junk."""
    splits = {"a": "train", "b": "train", "c": "query", "d": "gallery", "e": "gallery"}
    images = write_images(root, {"a": 3, "b": 2, "c": 2, "d": 2, "e": 1}, seed=0)
    entries = [
        Entry(path, name, splits[name], track=f"{name}{i % 2}", camera=7, frame=100 - i)
        for i, (path, name) in enumerate(images)
    ]
    kinds = {"d": "distractor", "e": "junk"}
    entries = [replace(e, kind=kinds.get(e.class_name)) for e in entries]  # type: ignore[arg-type]
    return [*entries, replace(entries[5], split="gallery", track="c9", camera=8)]


def write(entries: list[Entry], target: Path, **options: object) -> Store:
    return write_store("x", entries, Folder(target), run_serially, num_folds=2, **options)  # type: ignore[arg-type]


def test_columns_of_tracklets(tmp_path: Path) -> None:
    store = write(tracked(tmp_path), tmp_path / "store", protocol="reid", source="mars", images_per_shard=2)
    assert store.manifest["splits"] == {
        "train": {"images": 5, "classes": 2, "tracks": 4},
        "query": {"images": 2, "classes": 1, "tracks": 2},
        "gallery": {"images": 4, "classes": 1, "tracks": 4, "distractors": 2, "junk": 1},
    }
    assert store.track is not None and store.camera is not None and store.frame is not None
    assert store.label.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, -1, -1, -2]
    assert store.track.tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert store.camera.tolist() == [7] * 7 + [8] + [7] * 3
    assert store.frame.tolist() == [98, 100, 99, 96, 97, 94, 95, 95, 92, 93, 91], "in a tracklet by time"
    assert store.protocol == "reid" and store.manifest["source"] == "mars"
    assert (store.fold[store.split != "train"] == -1).all()


def test_images_of_no_class_keep_their_labels_and_the_others_are_renumbered(tmp_path: Path) -> None:
    store = write(tracked(tmp_path), tmp_path / "store")
    some = store.select(["query", "gallery"])
    assert some.labels.tolist() == [0, 0, 0, -1, -1, -2] and some.class_names == ("c",)
    assert some.labels.dtype == np.int64 and store.label[store.split == "query"].tolist() == [2, 2], (
        "the store's own stay"
    )
    assert some.tracks is not None and some.cameras is not None and some.frames is not None
    assert some.tracks.tolist() == [4, 5, 6, 7, 8, 9] and some.cameras.tolist() == [7, 7, 8, 7, 7, 7]
    assert some.frames.tolist() == [94, 95, 95, 92, 93, 91]
    one_fold = store.select(["train"], fold=0)
    assert one_fold.tracks is not None and len(one_fold.tracks) == len(one_fold) in (2, 3)


def test_without_tracklets_there_are_no_such_columns(store: Store) -> None:
    assert store.track is store.camera is store.frame is None
    samples = store.select(["test"])
    assert samples.tracks is samples.cameras is samples.frames is None
    assert not {"partial", "crop"} & set(store.manifest) and store.manifest["source"] == "entries"


@pytest.mark.parametrize("column", ["track", "camera", "frame"])
def test_a_column_is_for_all_images_or_none(column: str, tmp_path: Path) -> None:
    entries = tracked(tmp_path)
    entries[3] = replace(entries[3], **{column: None})
    with pytest.raises(UserError, match=f"10 of 11 images have a {column}: give it for all of them, or for none"):
        plan_shards(entries, 2, 10)


@pytest.mark.parametrize("kind", ["distractor", "junk"])
def test_images_of_no_class_are_never_trained_on(kind: str, tmp_path: Path) -> None:
    entries = tracked(tmp_path)
    entries[0] = replace(entries[0], kind=kind)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"a/0\.png is {kind} and in the training split"):
        write(entries, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_protocol_by_splits_also_of_stores_that_do_not_say_it(tmp_path: Path) -> None:
    images = write_images(tmp_path, {"a": 2, "b": 2, "c": 2}, seed=0)
    for splits, expected in ((("test", "test"), "leave_one_out"), (("query", "gallery"), "query_gallery")):
        entries = [Entry(p, n, "train" if n != "c" else splits[i % 2]) for i, (p, n) in enumerate(images)]
        store = write(entries, tmp_path / expected)
        assert store.protocol == store.manifest["protocol"] == expected
        manifest = store.manifest.copy()
        del manifest["protocol"]
        store.folder.write_json("manifest.json", manifest)
        assert Store(store.folder).protocol == expected
        store.folder.write_json("manifest.json", manifest | {"protocol": "of tomorrow"})
        with pytest.raises(UserError, match=r"is measured by 'of tomorrow', this program knows .*reid.*update raydml"):
            Store(store.folder)


def test_boxes_are_for_all_images_if_they_are_cut_out(tmp_path: Path) -> None:
    entries = [replace(e, box=(2.0, 3.0, 10.0, 5.0)) for e in tracked(tmp_path)]
    whole, cut = write(entries, tmp_path / "whole"), write(entries, tmp_path / "cut", crop=True)
    assert cut.fingerprint != whole.fingerprint == write(tracked(tmp_path), tmp_path / "bare").fingerprint
    with pytest.raises(UserError, match="not all images have a box to crop to"):
        write([*entries[1:], replace(entries[0], box=None)], tmp_path / "some", crop=True)
