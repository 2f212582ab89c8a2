"""The papers' datasets, read as their authors ship them, with the splits of deep metric learning and of re-identification.

    cub     CUB-200-2011 (Wah et al., 2011): the first 100 classes train, the other 100 test
    cars    Cars196 (Krause et al., 3dRR 2013): the first 98 classes train, the other 98 test
    sop     Stanford Online Products (Oh Song et al., CVPR 2016): its own two lists
    inshop  In-Shop Clothes Retrieval of DeepFashion (Liu et al., CVPR 2016): its own train, query, gallery
    mars    MARS (Zheng et al., ECCV 2016): tracklets; its test tracklets, queries included, are the gallery
    lpw     Labeled Pedestrian in the Wild (Song et al., AAAI 2018): tracklets; scene 1 tests

The halves of CUB and Cars are those of Oh Song et al., CVPR 2016, and so are the counts of the
image datasets (In-Shop's are of its own paper). Counts of MARS are of its paper and of its authors'
index files: 634 people, distractors (0000) and junk (00-1) make the 636 identities of its test
split; 626 people are queried. LPW's counts are those that other programs state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.data.entries import Entry, Kind
from pipeline.data.published import DatasetFormat, FileIndex, scalar
from pipeline.errors import UserError

Box = tuple[float, float, float, float]


def fields(tree: FileIndex, name: str, expected: str, skip: int = 0, from_end: bool = False) -> list[tuple[str, ...]]:
    """Rows of a list with columns separated by blanks; the last one (the first, if `from_end`) may contain blanks.

    Args:
        tree: Files of the dataset.
        name: The list's file name.
        expected: Names of the columns.
        skip: Lines before the first row.
        from_end: Columns are counted from the end of a line.

    Raises:
        UserError: A line has too few columns.
    """
    number, rows = len(expected.split()), []
    for i, line in enumerate(tree.lines(name)[skip:], skip + 1):
        if not line:
            continue
        row = tuple(line.rsplit(None, number - 1) if from_end else line.split(None, number - 1))
        if len(row) != number:
            raise UserError(f"{name}, line {i}: got {line!r}, expected {expected}")
        rows.append(row)
    return rows


def numbers(name: str, convert: Callable[[Any], Any], values: Sequence[Any]) -> tuple[Any, ...]:
    """Values of a list as numbers.

    Raises:
        UserError: One is not a number.
    """
    try:
        return tuple(convert(scalar(value)) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{name}: got {values}, expected numbers ({error})") from error


def read_cub(tree: FileIndex) -> Iterator[Entry]:
    """`images.txt`, `image_class_labels.txt`, `classes.txt`, `images/`, and `bounding_boxes.txt` if it exists.

    Corners of the boxes count from 0.
    """
    class_of = {image: label for image, label in fields(tree, "image_class_labels.txt", "IMAGE_ID CLASS_ID")}
    names = {label: name for label, name in fields(tree, "classes.txt", "CLASS_ID NAME")}
    boxes: dict[str, Box] = {}
    if tree.find("bounding_boxes.txt"):
        for image, *box in fields(tree, "bounding_boxes.txt", "IMAGE_ID X Y WIDTH HEIGHT"):
            left, top, width, height = numbers("bounding_boxes.txt", float, box)
            boxes[image] = (left, top, width, height)
    folder = tree.get("images/")
    for image, path in fields(tree, "images.txt", "IMAGE_ID PATH"):
        label = class_of.get(image)
        if label not in names:
            raise UserError(
                f"images.txt: image {image} ({path}) has no class in image_class_labels.txt and classes.txt"
            )
        split = "train" if numbers("classes.txt", int, [label])[0] <= 100 else "test"
        yield Entry(f"{folder}/{path}", names[label], split, box=boxes.get(image))


def read_cars(tree: FileIndex) -> Iterator[Entry]:
    """`cars_annos.mat` with `car_ims/`, or the devkit's two lists, which together name the same 16,185 images."""
    if tree.find("cars_annos.mat"):
        variables = tree.mat("cars_annos.mat")
        parent = tree.get("car_ims/").removesuffix("car_ims")
        yield from _cars("cars_annos.mat", variables, variables.get("class_names"), "relative_im_path", parent)
        return
    names = tree.mat("cars_meta.mat").get("class_names")
    for file, folder in (("cars_train_annos.mat", "cars_train/"), ("cars_test_annos_withlabels.mat", "cars_test/")):
        yield from _cars(file, tree.mat(file), names, "fname", tree.get(folder) + "/")


def _cars(file: str, variables: dict[str, Any], names: Any, path: str, parent: str) -> Iterator[Entry]:
    """Entries of one annotation file. Its boxes are MATLAB's: corners count from 1, both inside the box."""
    class_names = np.atleast_1d([] if names is None else names)
    rows = variables.get("annotations", [])
    for row in [rows] if isinstance(rows, dict) else rows:
        columns = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", path)
        if not isinstance(row, dict) or not set(columns) <= set(row):
            raise UserError(f"{file}: annotations have the fields {list(row)}, expected {', '.join(columns)}")
        left, top, right, bottom, label = numbers(file, int, [row[name] for name in columns[:5]])
        if not 1 <= label <= len(class_names):
            raise UserError(f"{file}: {row[path]} has class {label}, there are {len(class_names)} class names")
        name = str(scalar(class_names[label - 1])).strip()
        split = "train" if label <= 98 else "test"
        box = (left - 1.0, top - 1.0, right - left + 1.0, bottom - top + 1.0)
        source = f"{parent}{str(scalar(row[path])).strip()}"
        yield Entry(source, f"{label:03d}.{name}", split, box=box)


def read_sop(tree: FileIndex) -> Iterator[Entry]:
    """`Ebay_train.txt` and `Ebay_test.txt`; a class is a product, named with its category, as "00001 bicycle"."""
    for split in ("train", "test"):
        file = f"Ebay_{split}.txt"
        parent = tree.get(file).removesuffix(file)
        for _, label, _, path in fields(tree, file, "image_id class_id super_class_id path", skip=1):
            name = f"{numbers(file, int, [label])[0]:05d} {path.split('/')[0].removesuffix('_final')}"
            yield Entry(f"{parent}{path}", name, split)


def read_inshop(tree: FileIndex) -> Iterator[Entry]:
    """`list_eval_partition.txt`, `img/`, and the boxes of `list_bbox_inshop.txt` if it exists."""
    file = "list_eval_partition.txt"
    boxes: dict[str, Box] = {}
    if tree.find("list_bbox_inshop.txt"):
        columns = "image_name clothes_type pose_type x_1 y_1 x_2 y_2"
        for path, _, _, *corners in fields(tree, "list_bbox_inshop.txt", columns, skip=2, from_end=True):
            left, top, right, bottom = numbers("list_bbox_inshop.txt", float, corners)
            boxes[path] = (left, top, right - left, bottom - top)
    parent = tree.get("img/").removesuffix("img")
    for path, item, split in fields(tree, file, "image_name item_id evaluation_status", skip=2, from_end=True):
        if split not in ("train", "query", "gallery"):
            raise UserError(f"{file}: {path} has the status {split!r}, expected train, query or gallery")
        yield Entry(f"{parent}{path}", item, split, box=boxes.get(path))


MARS_NAME = re.compile(r"(\d{4}|00-1)C\d+T\d+F(\d+)\.jpe?g", re.IGNORECASE)
MARS_KINDS: dict[str, Kind] = {"0000": "distractor", "00-1": "junk"}


def read_mars(tree: FileIndex) -> Iterator[Entry]:
    """Tracklets are rows (first, last, person, camera) over the lines of a list of names, all counted from 1.

    A frame 0001C1T0001F001.jpg lies in `bbox_train/0001/` or `bbox_test/0001/`.
    """
    queries = set(_rows(tree, "query_IDX.mat", 1)[:, 0].tolist())
    for side in ("train", "test"):
        names = [line for line in tree.lines(f"{side}_name.txt") if line]
        folder, file = tree.get(f"bbox_{side}/"), f"tracks_{side}_info.mat"
        for number, (first, last, person, camera) in enumerate(_rows(tree, file, 4).tolist(), 1):
            split = "train" if side == "train" else "query" if number in queries else "gallery"
            identity = "00-1" if person == -1 else f"{person:04d}"
            track = f"{side} {number:05d}"
            kind = MARS_KINDS.get(identity)
            if not 1 <= first <= last <= len(names):
                raise UserError(f"{file}, row {number}: frames {first} to {last}, there are {len(names)} names")
            for name in names[first - 1 : last]:
                matched = MARS_NAME.fullmatch(name)
                if matched is None or matched[1] != identity:
                    raise UserError(
                        f"{file}, row {number}: frame {name!r}, expected one of {identity}, as {identity}C1T0001F001.jpg"
                    )
                source = f"{folder}/{identity}/{name}"
                frame = int(matched[2])
                yield Entry(source, identity, split, track=track, camera=camera, frame=frame, kind=kind)


def _rows(tree: FileIndex, file: str, columns: int) -> np.ndarray:
    """The one matrix of a MATLAB file, as integers [rows, columns]."""
    matrices = [np.asarray(value) for value in tree.mat(file).values()]
    if len(matrices) != 1 or matrices[0].dtype.kind not in "iuf" or matrices[0].size % columns:
        raise UserError(f"{file} contains {len(matrices)} variables, expected one matrix of {columns} columns")
    return matrices[0].astype(np.int64).reshape(-1, columns)


LPW_FRAME = re.compile(r"(?:.*/)?scen([123])/view(\d)/(\d+)/(\d+)\.jpe?g", re.IGNORECASE)
LPW_VIEWS = {1: 3, 2: 4, 3: 4}


def read_lpw(tree: FileIndex) -> Iterator[Entry]:
    """Frames `scen1/view2/17/342.jpg`: scene, view, person, number. Persons are numbered in each scene anew.

    A tracklet is all frames of a person in one view. Queries are view 2 of scene 1, the gallery is
    its other two views. Cameras are numbered over all scenes: 1 to 3, 4 to 7, 8 to 11.
    """
    for path in tree.root_of:
        matched = LPW_FRAME.fullmatch(path)
        if matched is None:
            continue
        scene, view, person, frame = (int(part) for part in matched.groups())
        if not 1 <= view <= LPW_VIEWS[scene]:
            raise UserError(f"{path}: scene {scene} has {LPW_VIEWS[scene]} views")
        split = "train" if scene > 1 else "query" if view == 2 else "gallery"
        camera = view + sum(views for earlier, views in LPW_VIEWS.items() if earlier < scene)
        name = f"scen{scene}/{person:04d}"
        yield Entry(path, name, split, track=f"{name}/view{view}", camera=camera, frame=frame)


LAYOUTS = {
    "cub": DatasetFormat(
        "CUB-200-2011",
        (("images.txt", "image_class_labels.txt", "classes.txt", "images/"),),
        r"cub.*",
        read_cub,
        {"train": {"images": 5864, "classes": 100}, "test": {"images": 5924, "classes": 100}},
        "leave_one_out",
        boxes=("bounding_boxes.txt",),
    ),
    "cars": DatasetFormat(
        "Cars196",
        (
            ("cars_annos.mat", "car_ims/"),
            (
                "cars_train_annos.mat",
                "cars_test_annos_withlabels.mat",
                "cars_meta.mat",
                "cars_train/",
                "cars_test/",
            ),
        ),
        r"cars?[-_].*|devkit",
        read_cars,
        {"train": {"images": 8054, "classes": 98}, "test": {"images": 8131, "classes": 98}},
        "leave_one_out",
        boxes=(),
    ),
    "sop": DatasetFormat(
        "Stanford Online Products",
        (("Ebay_train.txt", "Ebay_test.txt"),),
        r".*online[-_ ]products.*",
        read_sop,
        {"train": {"images": 59_551, "classes": 11_318}, "test": {"images": 60_502, "classes": 11_316}},
        "leave_one_out",
    ),
    "inshop": DatasetFormat(
        "In-Shop",
        (("list_eval_partition.txt", "img/"),),
        r"img|eval|anno|in[-_ ]?shop.*",
        read_inshop,
        {
            "train": {"images": 25_882, "classes": 3997},
            "query": {"images": 14_218, "classes": 3985},
            "gallery": {"images": 12_612, "classes": 3985},
        },
        "query_gallery",
        boxes=("list_bbox_inshop.txt",),
    ),
    "mars": DatasetFormat(
        "MARS",
        (
            (
                "train_name.txt",
                "test_name.txt",
                "tracks_train_info.mat",
                "tracks_test_info.mat",
                "query_IDX.mat",
                "bbox_train/",
                "bbox_test/",
            ),
        ),
        r"bbox_(train|test)|info|mars.*",
        read_mars,
        {
            "train": {"images": 509_914, "classes": 625, "tracks": 8298},
            "query": {"classes": 626, "tracks": 1980},
            "query+gallery": {"images": 681_089, "classes": 634, "tracks": 12_180},
        },
        "reid",
    ),
    "lpw": DatasetFormat(
        "LPW",
        (("scen1/", "scen2/", "scen3/"),),
        r"lpw.*|pep.*",
        read_lpw,
        {
            "train": {"images": 418_739, "classes": 1975},
            "query": {"images": 63_118, "classes": 756, "tracks": 756},
            "gallery": {"images": 108_690, "classes": 756},
        },
        "query_gallery",
    ),
}
