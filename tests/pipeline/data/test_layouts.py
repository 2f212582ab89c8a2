"""The papers' datasets as their authors ship them: every row of their lists, from folders and archives, whole or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from pipeline.data.entries import Entry
from pipeline.data.layouts import LAYOUTS
from pipeline.errors import UserError
from tests.pipeline import shipped
from tests.pipeline.shipped import in_order, made, read


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped.shrink(monkeypatch)


def test_the_counts_are_those_of_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert {name: layout.counts for name, layout in LAYOUTS.items()} == {
        "cub": {"train": {"images": 5864, "classes": 100}, "test": {"images": 5924, "classes": 100}},
        "cars": {"train": {"images": 8054, "classes": 98}, "test": {"images": 8131, "classes": 98}},
        "sop": {"train": {"images": 59551, "classes": 11318}, "test": {"images": 60502, "classes": 11316}},
        "inshop": {
            "train": {"images": 25882, "classes": 3997},
            "query": {"images": 14218, "classes": 3985},
            "gallery": {"images": 12612, "classes": 3985},
        },
        "mars": {
            "train": {"images": 509914, "classes": 625, "tracks": 8298},
            "query": {"classes": 626, "tracks": 1980},
            "query+gallery": {"images": 681089, "classes": 634, "tracks": 12180},
        },
        "lpw": {
            "train": {"images": 418739, "classes": 1975},
            "query": {"images": 63118, "classes": 756, "tracks": 756},
            "gallery": {"images": 108690, "classes": 756},
        },
    }
    assert {name: layout.protocol for name, layout in LAYOUTS.items()} == {
        "cub": "leave_one_out", "cars": "leave_one_out", "sop": "leave_one_out", "inshop": "query_gallery",
        "mars": "reid", "lpw": "query_gallery"}  # fmt: skip


# ---- what is read ----------------------------------------------------------------------------------------------------


def cub_entries() -> list[Entry]:
    names = {99: "099.Gull é", 100: "100.Auk", 101: "101.Great Pelican", 102: "102.Wren"}
    return [
        Entry(
            f"CUB_200_2011/images/{names[label]}/{names[label][4:]} {i}.jpg",
            names[label],
            "train" if label <= 100 else "test",
            box=(8.0 + i, 4.0, 40.0, 20.0),
        )
        for i in range(12)
        for label in [99 + i // 3]
    ]


CAR_NAMES = ["097.AM General Hummer SUV 2000", "098.Audi TT RS", "099.BMW Z4", "100.Ram C/V Cargo Van"]


def cars_entries(path: Callable[[int], str]) -> list[Entry]:
    return [
        Entry(path(i), CAR_NAMES[i // 2], "train" if i < 4 else "test", box=(10.0, 4.0, 50.0 + i, 46.0))
        for i in range(8)
    ]


def sop_entries() -> list[Entry]:
    products = {1: "bicycle", 2: "coffee maker", 11319: "bicycle", 11320: "coffee maker"}
    return [
        Entry(
            f"Stanford_Online_Products/{kind}_final/{product}0_{j}.JPG",
            f"{product:05d} {kind}",
            "train" if product < 10000 else "test",
        )
        for product, kind in products.items()
        for j in range(3)
    ]


def inshop_entries() -> list[Entry]:
    return [
        Entry(
            f"Img/img/WOMEN/Tees Tanks/id_0000000{item}/0{j}_1_front.jpg",
            f"id_0000000{item}",
            "train" if item < 3 else "query" if j == 1 else "gallery",
            box=(10.0, 20.0, 40.0, 50.0),
        )
        for item in (1, 2, 3, 4)
        for j in (1, 2, 3)
    ]


def mars_entries() -> list[Entry]:
    tracks = [  # side, person, row, camera, frames, split, kind
        ("train", "0001", 1, 1, 2, "train", None), ("train", "0001", 2, 2, 3, "train", None),
        ("train", "0003", 3, 1, 1, "train", None), ("train", "0005", 4, 6, 2, "train", None),
        ("test", "00-1", 1, 1, 2, "gallery", "junk"), ("test", "0000", 2, 3, 2, "gallery", "distractor"),
        ("test", "0002", 3, 1, 2, "query", None), ("test", "0002", 4, 2, 3, "gallery", None),
        ("test", "0004", 5, 1, 2, "query", None), ("test", "0004", 6, 5, 1, "gallery", None),
    ]  # fmt: skip
    return [
        Entry(
            f"bbox_{side}/{person}/{person}C{camera}T{row:04d}F{frame:03d}.jpg",
            person,
            split,
            track=f"{side} {row:05d}",
            camera=camera,
            frame=frame,
            kind=kind,
        )
        for side, person, row, camera, frames, split, kind in tracks
        for frame in range(1, frames + 1)
    ]


def lpw_entries() -> list[Entry]:
    cameras = {(1, 1): 1, (1, 2): 2, (1, 3): 3, (2, 1): 4, (2, 2): 5, (2, 3): 6, (2, 4): 7,
               (3, 1): 8, (3, 2): 9, (3, 3): 10, (3, 4): 11}  # fmt: skip
    return [
        Entry(
            f"pep_256x128/scen{scene}/view{view}/{person}/{frame}.jpg",
            f"scen{scene}/000{person}",
            "train" if scene > 1 else "query" if view == 2 else "gallery",
            track=f"scen{scene}/000{person}/view{view}",
            camera=camera,
            frame=frame,
        )
        for (scene, view), camera in cameras.items()
        for person in (1, 2)
        for frame in (9, 10)
    ]


EXPECTED = {
    "cub": cub_entries,
    "cars": lambda: cars_entries(lambda i: f"car_ims/{i:06d}.jpg"),
    "cars devkit": lambda: cars_entries(lambda i: f"cars_{'test' if i % 2 else 'train'}/{i:05d}.jpg"),
    "sop": sop_entries,
    "inshop": inshop_entries,
    "mars": mars_entries,
    "lpw": lpw_entries,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_row_is_read(name: str, tmp_path: Path) -> None:
    root = made(name, tmp_path / "in")
    entries = read(name, [str(root)], tmp_path / "scratch")
    assert all(e.path and e.source.endswith(e.path) for e in entries), (
        "what is recorded does not name the scratch folder"
    )
    assert in_order([replace(e, path=None) for e in entries]) == in_order(EXPECTED[name]())


# ---- lists that cannot be right --------------------------------------------------------------------------------------


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode())


def mat(path: Path, **variables: object) -> None:
    savemat(path, variables)


BAD_LISTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a row without a path": ("cub", lambda r: edit(r / "CUB_200_2011/images.txt", "2 099.Gull é/Gull é 1.jpg", "2"), r"images\.txt, line 2: got '2', expected IMAGE_ID PATH"),
    "an image without a class": ("cub", lambda r: edit(r / "CUB_200_2011/image_class_labels.txt", "5 100", "55 100"), r"image 5 \(100\.Auk/Auk 4\.jpg\) has no class"),
    "a class without a name": ("cub", lambda r: edit(r / "CUB_200_2011/classes.txt", "102 ", "103 "), "image 10 .* has no class"),
    "a box of words": ("cub", lambda r: edit(r / "CUB_200_2011/bounding_boxes.txt", "4.0 40.0", "4.0 wide"), r"bounding_boxes\.txt: got .* expected numbers"),
    "a list that is no text": ("cub", lambda r: (r / "CUB_200_2011/classes.txt").write_bytes(b"1 \xff\xfe\n"), r"classes\.txt is not UTF-8 text"),
    "no MATLAB file": ("cars", lambda r: (r / "cars_annos.mat").write_bytes(b"<html>"), r"cars_annos\.mat cannot be read as a MATLAB file"),
    "other fields": ("cars", lambda r: mat(r / "cars_annos.mat", annotations=shipped.structs([{"class": 1}]), class_names=shipped.class_names()), r"annotations have the fields \['class'\], expected bbox_x1"),
    "fewer names than classes": ("cars", lambda r: mat(r / "cars_annos.mat", annotations=shipped.structs([{"relative_im_path": "x.jpg", **shipped._car(0)}]), class_names=shipped.cells(["a"])), r"x\.jpg has class 97, there are 1 class names"),
    "no annotations": ("cars", lambda r: mat(r / "cars_annos.mat", x=1), r"train: 0 of 4 images"),
    "a row of three columns": ("sop", lambda r: edit(r / "Stanford_Online_Products/Ebay_test.txt", "7 11319 2 ", "7 11319 "), r"Ebay_test\.txt, line 2: got .*expected image_id class_id super_class_id path"),
    "a product that is no number": ("sop", lambda r: edit(r / "Stanford_Online_Products/Ebay_test.txt", "7 11319", "7 bike"), r"Ebay_test\.txt: got \['bike'\], expected numbers"),
    "another split": ("inshop", lambda r: edit(r / "Eval/list_eval_partition.txt", "query", "valid"), "has the status 'valid', expected train, query or gallery"),
    "frames beyond the list": ("mars", lambda r: mat(r / "info/tracks_test_info.mat", x=np.array([[1, 99, -1, 1]])), r"tracks_test_info\.mat, row 1: frames 1 to 99, there are 12 names"),
    "frames of another person": ("mars", lambda r: mat(r / "info/tracks_train_info.mat", x=np.array([[1, 2, 9, 1]])), r"row 1: frame '0001C1T0001F001\.jpg', expected one of 0009"),
    "a frame of another name": ("mars", lambda r: edit(r / "info/train_name.txt", "0001C1T0001F002", "0001C1T0001"), r"row 1: frame '0001C1T0001\.jpg'"),
    "a matrix of another shape": ("mars", lambda r: mat(r / "info/tracks_train_info.mat", x=np.ones((1, 3))), "expected one matrix of 4 columns"),
    "two matrices": ("mars", lambda r: mat(r / "info/query_IDX.mat", x=1, y=2), "contains 2 variables, expected one matrix"),
    "a fourth view of scene 1": ("lpw", lambda r: shipped.write(r / "pep_256x128/scen1/view4/1/1.jpg", b""), r"scen1/view4/1/1\.jpg: scene 1 has 3 views"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_list_that_cannot_be_right_is_named(case: str, tmp_path: Path) -> None:
    name, damage, says = BAD_LISTS[case]
    root = made(name, tmp_path / "in")
    damage(root)
    with pytest.raises(UserError, match=says) as caught:
        read(name, [str(root)], tmp_path / "scratch")
    assert "\n" not in str(caught.value)


def test_one_car_and_one_name(tmp_path: Path) -> None:
    """MATLAB writes an array of one struct as the struct, and a cell array of one name as the name."""
    root = made("cars", tmp_path / "in")
    row = {"relative_im_path": "car_ims/000000.jpg", **shipped._car(0), "class": 1}
    mat(root / "cars_annos.mat", annotations=shipped.structs([row]), class_names=shipped.cells(["Acura"]))
    assert [e.class_name for e in read("cars", [str(root)], tmp_path / "scratch", partial=True)] == ["001.Acura"]


def test_splits_are_disjoint_in_classes() -> None:
    for entries in (expected() for expected in EXPECTED.values()):
        sides: dict[bool, set[str]] = {True: set(), False: set()}
        for entry in entries:
            sides[entry.split == "train"].add(entry.class_name)
        assert not sides[True] & sides[False]
        assert Counter(e.split for e in entries if e.kind) <= Counter(gallery=4)
