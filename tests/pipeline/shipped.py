"""Small copies of the papers' datasets in exactly their authors' layouts, with the quirks of such files, drawn from emoji."""

from __future__ import annotations

import functools
import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pipeline.data import own_images
from pipeline.data.entries import Entry
from pipeline.data.layouts import LAYOUTS
from pipeline.data.published import DatasetFormat, FileIndex, open_sources, read_entries
from pipeline.errors import UserError


@functools.cache
def _drawings() -> list[str]:
    return [entry.source for entry in own_images.emoji()]


def drawing(number: int) -> Image.Image:
    """An emoji on white, 72 × 72."""
    image = Image.open(_drawings()[number % len(_drawings())]).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB").resize((72, 72))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, **options)
    return out.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def turned() -> bytes:
    """Drawing 2 as a camera stores it that was held upright: on its side, with a tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(drawing(2).rotate(90), exif=exif)


CUB_ODD = {  # pictures that are not plain RGB, by their place in the list: bytes, and what they show
    0: lambda: (jpeg(drawing(0).convert("CMYK")), drawing(0)),
    1: lambda: (jpeg(drawing(1).convert("L")), drawing(1).convert("L").convert("RGB")),
    2: lambda: (turned(), drawing(2)),
}
CUB_CLASSES = {99: "099.Gull é", 100: "100.Auk", 101: "101.Great Pelican", 102: "102.Wren"}


def cub(root: Path) -> None:
    """12 images of classes 99 to 102; lists with a byte order mark, CRLF, trailing blanks and an empty last line."""
    base, lists = root / "CUB_200_2011", ["", "", ""]
    for i in range(12):
        label = 99 + i // 3
        path = f"{CUB_CLASSES[label]}/{CUB_CLASSES[label][4:]} {i}.jpg"
        write(base / "images" / path, CUB_ODD[i]()[0] if i in CUB_ODD else jpeg(drawing(i)))
        lists[0] += f"{i + 1} {path} \r\n"
        lists[1] += f"{i + 1} {label}\r\n"
        lists[2] += f"{i + 1} {8.0 + i} 4.0 40.0 20.0\r\n"
    write(base / "images.txt", "\ufeff" + lists[0])
    write(base / "image_class_labels.txt", lists[1])
    write(base / "bounding_boxes.txt", lists[2] + "\r\n")
    write(base / "classes.txt", "".join(f"{label} {name}\n" for label, name in CUB_CLASSES.items()))
    write(root / "attributes.txt", "1 has_bill_shape::curved\n")


CARS = [(97, "AM General Hummer SUV 2000"), (98, "Audi TT RS"), (99, "BMW Z4"), (100, "Ram C/V Cargo Van")]


def cells(values: Sequence[Any]) -> np.ndarray:
    """A MATLAB cell array [1, n]."""
    array = np.empty((1, len(values)), object)
    array[0, :] = values
    return array


def structs(rows: list[dict[str, Any]]) -> np.ndarray:
    """A MATLAB struct array [1, n], its values matrices and cells as MATLAB writes them."""
    array = np.empty((1, len(rows)), [(name, object) for name in rows[0]])
    for i, row in enumerate(rows):
        array[0, i] = tuple(np.array([[v]], np.uint8) if isinstance(v, int) else v for v in row.values())
    return array


def _car(i: int, **more: Any) -> dict[str, Any]:
    box = {"bbox_x1": 11, "bbox_y1": 5, "bbox_x2": 60 + i, "bbox_y2": 50}
    return {**box, "class": CARS[i // 2][0], **more}


def class_names() -> np.ndarray:
    names = [f"car {i}" for i in range(1, 101)]
    for label, name in CARS:
        names[label - 1] = name
    return cells(names)


def cars(root: Path) -> None:
    """`cars_annos.mat` with `car_ims/`, two images each of classes 97 to 100."""
    for i in range(8):
        write(root / "car_ims" / f"{i:06d}.jpg", jpeg(drawing(i)))
    rows = [{"relative_im_path": f"car_ims/{i:06d}.jpg", **_car(i, test=i % 2)} for i in range(8)]
    savemat(root / "cars_annos.mat", {"annotations": structs(rows), "class_names": class_names()})


def cars_devkit(root: Path) -> None:
    """The same cars as the devkit names them: odd ones are its test images; a name in a cell within the cell."""
    for side, odd in (("train", 0), ("test", 1)):
        for i in range(odd, 8, 2):
            write(root / f"cars_{side}" / f"{i:05d}.jpg", jpeg(drawing(i)))
    (root / "devkit").mkdir()
    train = structs([_car(i, fname=cells([f"{i:05d}.jpg"])) for i in range(0, 8, 2)])
    test = structs([_car(i, fname=f"{i:05d}.jpg") for i in range(1, 8, 2)])
    savemat(root / "devkit" / "cars_train_annos.mat", {"annotations": train})
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": class_names()})
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": test})


def sop(root: Path) -> None:
    """Products 1 and 2 train, 11319 and 11320 test."""
    base, number = root / "Stanford_Online_Products", 0
    for split, products in (("train", (1, 2)), ("test", (11319, 11320))):
        text = "image_id class_id super_class_id path\n"
        for product in products:
            for j in range(3):
                number += 1
                path = f"{'bicycle' if product % 2 else 'coffee maker'}_final/{product}0_{j}.JPG"
                text += f"{number} {product} {1 + product % 2} {path}\n"
                write(base / path, jpeg(drawing(number)))
        write(base / f"Ebay_{split}.txt", text)


def inshop(root: Path) -> None:
    """The official folder: lists in columns aligned by blanks, images in an archive within."""
    rows = [
        (f"img/WOMEN/Tees Tanks/id_0000000{item}/0{j}_1_front.jpg", item, j) for item in (1, 2, 3, 4) for j in (1, 2, 3)
    ]
    partition, boxes = (
        "12\nimage_name item_id evaluation_status\n",
        "12\nimage_name clothes_type pose_type x_1 y_1 x_2 y_2\n",
    )
    with zipfile.ZipFile(_made(root / "Img" / "img.zip"), "w") as packed:
        for i, (path, item, j) in enumerate(rows):
            split = "train" if item < 3 else "query" if j == 1 else "gallery"
            partition += f"{path:70} id_0000000{item} {split:8}\n"
            boxes += f"{path:70} 1 2  010 020 050 070\n"
            packed.writestr(path, jpeg(drawing(i)))
    write(root / "Img" / "img_highres.zip", b"not to be looked at")
    write(root / "Eval" / "list_eval_partition.txt", partition)
    write(root / "Anno" / "list_bbox_inshop.txt", boxes)


MARS_TRACKS = {  # person, camera, frames
    "train": [(1, 1, 2), (1, 2, 3), (3, 1, 1), (5, 6, 2)],
    "test": [(-1, 1, 2), (0, 3, 2), (2, 1, 2), (2, 2, 3), (4, 1, 2), (4, 5, 1)],
}
MARS_QUERIES = [3, 5]  # rows of the test tracklets, from 1


def mars(
    root: Path,
    tracks: Mapping[str, Sequence[tuple[int, int, int]]] = MARS_TRACKS,
    queries: Sequence[int] = MARS_QUERIES,
) -> None:
    number = 0
    for side, own in tracks.items():
        names, rows = [], []
        for i, (person, camera, frames) in enumerate(own, 1):
            rows.append((len(names) + 1, len(names) + frames, person, camera))
            identity = "00-1" if person < 0 else f"{person:04d}"
            for frame in range(1, frames + 1):
                number += 1
                names.append(f"{identity}C{camera}T{i:04d}F{frame:03d}.jpg")
                write(root / f"bbox_{side}" / identity / names[-1], jpeg(drawing(number)))
        write(root / "info" / f"{side}_name.txt", "".join(f"{name}\n" for name in names))
        savemat(root / "info" / f"tracks_{side}_info.mat", {f"track_{side}_info": np.array(rows, np.int32)})
    savemat(root / "info" / "query_IDX.mat", {"query_IDX": np.array([queries], np.uint16)})


def lpw(root: Path) -> None:
    """Two people in each scene, two frames of each in every view; the later frame is named as if it came first."""
    for scene, views in ((1, 3), (2, 4), (3, 4)):
        for view in range(1, views + 1):
            for person in (1, 2):
                for frame in (9, 10):
                    name = f"scen{scene}/view{view}/{person}/{frame}.jpg"
                    write(root / "pep_256x128" / name, jpeg(drawing(scene * 10 + person)))
    write(root / "pep_256x128" / "scen1" / "view1" / "1" / "Thumbs.db", b"x")


WRITE: dict[str, Callable[[Path], None]] = {
    "cub": cub, "cars": cars, "cars devkit": cars_devkit, "sop": sop, "inshop": inshop, "mars": mars, "lpw": lpw}  # fmt: skip

COUNTS: dict[str, dict[str, dict[str, int]]] = {
    "cub": {"train": {"images": 6, "classes": 2}, "test": {"images": 6, "classes": 2}},
    "cars": {"train": {"images": 4, "classes": 2}, "test": {"images": 4, "classes": 2}},
    "sop": {"train": {"images": 6, "classes": 2}, "test": {"images": 6, "classes": 2}},
    "inshop": {"train": {"images": 6, "classes": 2}, "query": {"images": 2, "classes": 2}, "gallery": {"images": 4, "classes": 2}},
    "mars": {
        "train": {"images": 8, "classes": 3, "tracks": 4},
        "query": {"classes": 2, "tracks": 2},
        "query+gallery": {"images": 12, "classes": 2, "tracks": 6},
    },
    "lpw": {
        "train": {"images": 32, "classes": 4},
        "query": {"images": 4, "classes": 2, "tracks": 2},
        "gallery": {"images": 8, "classes": 2},
    },
}  # fmt: skip


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every layout expect as many images as are written here."""
    for name, counts in COUNTS.items():
        monkeypatch.setitem(LAYOUTS, name, replace(LAYOUTS[name], counts=counts))


def pack(source: Path, target: Path, names: Sequence[str] | None = None) -> str:
    """All that is in a folder (or some of it) as an archive; its name says of which kind."""
    tops = names or sorted(p.name for p in source.iterdir())
    files = sorted(
        p for top in tops for p in ([source / top] if (source / top).is_file() else (source / top).rglob("*"))
    )
    if target.suffix == ".zip":
        with zipfile.ZipFile(_made(target), "w", zipfile.ZIP_DEFLATED) as zipped:
            for file in files:
                zipped.write(file, file.relative_to(source))
    else:
        kind = {".tgz": "w:gz", ".gz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz", ".tar": "w"}[target.suffix]
        with tarfile.open(_made(target), kind) as tar:  # type: ignore[call-overload]
            for file in files:
                tar.add(file, str(file.relative_to(source)), recursive=False)
    return str(target)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# ---- reading them


def made(name: str, root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    WRITE[name](root)
    return root


def layout_of(name: str) -> DatasetFormat:
    return LAYOUTS[name.split()[0]]


def read(name: str, sources: list[str], scratch: Path, partial: bool = False) -> list[Entry]:
    """Entries with sources relative to the top of the dataset."""
    with open_sources(layout_of(name), sources, str(scratch)) as tree:
        entries, _ = read_entries(layout_of(name), tree, partial)
        assert all(Path(e.source).is_file() for e in entries)
        return [replace(e, source=str(Path(e.source).relative_to(tree.root_of[_key(tree, e)]))) for e in entries]


def _key(tree: FileIndex, entry: Entry) -> str:
    return next(key for key in tree.root_of if tree.source(key) == entry.source)


def missing(name: str, sources: list[str], scratch: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(name, sources, scratch)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def in_order(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda e: e.source)
