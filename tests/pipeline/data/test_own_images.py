"""Where images come from: folders, CSV lists, the emoji; and how classes are split without looking at images."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import own_images
from pipeline.data.entries import SPLITS, Entry, by_hash, split_classes
from pipeline.data.own_images import emoji
from pipeline.data.write_store import plan_shards
from pipeline.errors import UserError
from pipeline.storage import Folder


def folder(root: str) -> list[Entry]:
    return own_images.folder(root).entries


def table(path: str) -> list[Entry]:
    return own_images.table(path).entries


def halves(names: set[str]) -> tuple[set[str], set[str]]:
    """The rule, spelled out: names in the order of their sha256, the first half trains."""
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(order[: len(order) // 2]), set(order[len(order) // 2 :])


def sides(entries: list[Entry]) -> tuple[set[str], set[str]]:
    train, test = ({e.class_name for e in entries if e.split == s} for s in ("train", "test"))
    assert {e.split for e in entries} <= {"train", "test"}
    return train, test


def test_split_is_disjoint_by_halves_of_hashes() -> None:
    entries = [Entry(f"{c}/{i}", f"class {c}") for c in range(21) for i in range(3)]
    assert sides(split_classes(entries)) == halves({f"class {c}" for c in range(21)})
    assert [e.source for e in split_classes(entries)] == [e.source for e in entries]
    assert split_classes(entries[::-1])[::-1] == split_classes(entries), "whatever the order"
    grouped = [Entry(str(i), f"{i}", group=f"g{i // 3}") for i in range(30)]
    train, test = sides(split_classes(grouped))
    assert not {int(c) // 3 for c in train} & {int(c) // 3 for c in test}, "groups stay whole"
    assert by_hash(["b", "a", "b"]) == by_hash(["a", "b"])


# ---- folder ----------------------------------------------------------------------------------------------------------


def test_folder_of_class_folders(folder_of_classes: Folder) -> None:
    entries = folder(folder_of_classes.uri)
    names = {"cat", "dog", "émü 1", "zebra"}
    assert Counter(e.class_name for e in entries) == {name: 2 for name in names}
    assert sides(entries) == halves(names)
    assert entries == sorted(entries, key=lambda e: (e.class_name, e.source))
    place, name = entries[0].source.rsplit("/", 1)
    assert Folder(place).read(name) == b"cat1", "sources can be opened as they stand"
    assert folder(folder_of_classes.uri + "/") == entries


@pytest.fixture(params=["local", "s3"])
def folder_of_classes(request: pytest.FixtureRequest) -> Folder:
    if request.param == "local":
        root = Folder(request.getfixturevalue("tmp_path") / "my images")
    else:
        root = Folder(request.getfixturevalue("bucket")) / "images"
    for name in ("zebra", "cat", "émü 1", "dog"):
        for i in (2, 1):
            root.write(f"{name}/{i}.JPG", f"{name}{i}".encode())
    for hidden in (".DS_Store", "cat/.thumbnail.png", ".cache/x.png"):
        root.write(hidden, b"")
    return root


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, "does not exist"),
        ([], "no image in"),
        (["stray.png"], r"stray\.png: expected images as .*/CLASS/IMAGE"),
        (["photos.zip"], r"unpack photos\.zip first"),
        (["list.csv"], r"pipeline\.prepare csv .*/list\.csv"),
        (["train/1.png", "test/2.png"], r"/test holds images without class folders"),
        (["train/a/1.png", "test/b/1.png", "more/1.png"], r"split folders 'test', 'train' and beside them 'more'"),
    ],
)
def test_folder_refuses(files: list[str] | None, says: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in files or []:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    if files == []:
        root.mkdir()
    with pytest.raises(UserError, match=says):
        folder(str(root))


# ---- CSV -------------------------------------------------------------------------------------------------------------


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_with_splits(encoding: str, newline: str, tmp_path: Path) -> None:
    rows = [
        "path,label,split",
        "sub/b.jpg,ü,train",
        "/abs/a.jpg,ü,train",
        "s3://bucket/c.jpg,x,query",
        '"sub/d, e.jpg",x,gallery',
    ]
    entries = table(write(tmp_path / "list.csv", newline.join(rows) + newline, encoding))
    assert entries == [  # by class, then by source
        Entry(f"{tmp_path}/sub/d, e.jpg", "x", "gallery"),
        Entry("s3://bucket/c.jpg", "x", "query"),
        Entry("/abs/a.jpg", "ü", "train"),
        Entry(f"{tmp_path}/sub/b.jpg", "ü", "train"),
    ]


def test_csv_without_splits_is_split_like_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "label,path\n" + "".join(f"c{i % 7},{i}.png\n" for i in range(21))
    file = write(tmp_path / "list.csv", text)
    assert sides(table(file)) == halves({f"c{i}" for i in range(7)})
    monkeypatch.chdir(tmp_path)
    assert table("list.csv") == table(file), "relative to the file, wherever it was named from"


def test_csv_in_object_storage(bucket: str) -> None:
    place = Folder(bucket) / "lists"
    place.write("a.csv", b"path,label\nimages/1.png,x\n/local/2.png,y\n")
    assert [e.source for e in table(f"{place}/a.csv")] == [f"{bucket}/lists/images/1.png", "/local/2.png"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"has the columns \[\], expected path,label or path,label,split"),
        ("path\na\n", r"has the columns \['path'\]"),
        ("path,kind\na,b\n", r"has the columns \['path', 'kind'\].*--columns path=NAME label=NAME"),
        ("path,class,category\na,b,c\n", "the label may be in class or category: choose with --columns label=NAME"),
        ("path,path,label\na,a,c\n", "two columns 'path'"),
        ("path;label\na;b\n", "separates its columns by semicolons, expected commas: add --separator semicolon"),
        ("path\tlabel\na\tb\n", "separates its columns by tabs, expected commas: add --separator tab"),
        ("a/1.jpg,cat\na/2.jpg,dog\n", r"its first line, 'a/1\.jpg,cat', looks like an image"),
        ('path,label\na,x\nb,"6in pipe\nc,y\n', "line 3: a quote is not closed"),
        ('path,label\na,"x\nb,y\nc,"z\n', "line 2: a quote"),
        ("path,label\na,x\nb,y\n./a,z\n", r"line 4: .*/a has two labels, 'z' and in line 2 'x'"),
        ("path,label\nC:\\img\\a.jpg,x\n", "line 2: .*is a path of Windows"),
        ("path,label,is_query,is_gallery\na,x,0,0\n", "line 2: the image is neither query nor gallery"),
        ("path,label,is_query,is_gallery\na,x,maybe,0\n", "line 2: is_query is 'maybe', expected 1 or 0"),
        ("path,label,frame\na,x,one\n", "line 2: frame is 'one', expected a whole number"),
        ("path,label,camera\na,x,\n", "line 2"),
        ("path,label\n", "has a header but no rows"),
        ("path,label\na,x\nb\n", "line 3"),
        ("path,label\na,x\n,x\n", "line 3"),
        ("path,label\na, b.jpg,x\n", "line 2"),  # a comma in a path that is not quoted
        (
            "path,label,split\na,x,train\nb,y,dev\n",
            r"line 3: got \['b', 'y', 'dev'\].*train, .*test, .*query, .*gallery",
        ),
        ("path,label,split\na,x,train\nb,y,\n", "line 3"),
        (
            "path,label,split\na,x,train\nb,x,test\nc,y,test\n",
            r"1 class is in train and in a test split \(first: 'x'\)",
        ),
        ("path,label,split\na,x,train\nb,x,gallery\nc,y,query\n", "1 class is in train and in a test split"),
        ("path,label,split\na,x,train\nb,y,query\n", "query and gallery together"),
        ("path,label,split\na,x,train\nb,y,gallery\nc,y,query\nd,z,test\n", "query and gallery together"),
    ],
)
def test_csv_refuses(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as caught:
        table(write(tmp_path / "list.csv", text))
    assert "\n" not in str(caught.value) and "list.csv" in str(caught.value)


def test_csv_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("path,label\nü,x\n".encode("latin-1"))
    for name in ("nothing.csv", "latin.csv", "."):
        with pytest.raises(UserError, match="cannot be read as UTF-8 text") as caught:
            table(str(tmp_path / name))
        assert "\n" not in str(caught.value)


# ---- emoji -----------------------------------------------------------------------------------------------------------


@functools.cache
def listed(skin_tones: bool) -> list[Entry]:
    return emoji(skin_tones)


@pytest.mark.parametrize(
    ("skin_tones", "classes", "images", "train", "test"),
    [(False, 1853, 12428, (926, 6175), (927, 6253)), (True, 3633, 24223, None, None)],
)
def test_emoji_counts(skin_tones: bool, classes: int, images: int, train: tuple | None, test: tuple | None) -> None:
    entries = listed(skin_tones)
    assert len(entries) == images and len({e.class_name for e in entries}) == classes
    for split, expected in (("train", train), ("test", test)):
        own = [e for e in entries if e.split == split]
        assert expected is None or (len({e.class_name for e in own}), len(own)) == expected
    if not skin_tones:
        assert sides(entries) == halves({e.class_name for e in entries})
        assert not any(re.search("1f3f[b-f]", e.class_name) for e in entries)


def test_all_tones_of_an_emoji_stay_together() -> None:
    entries = listed(True)
    places: dict[str, set] = {}
    for shard in plan_shards(entries, num_folds=4, images_per_shard=10_000):
        for entry, fold in zip(shard.entries, shard.folds, strict=True):
            codes = re.findall("[0-9a-f]{2,}", entry.class_name)
            bare = [c for c in codes if c not in ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "fe0f")]
            places.setdefault("-".join(bare or codes), set()).add((entry.split, fold))
    assert len(places) == 1864, "1,859 emoji and the five swatches of the tones themselves"
    assert all(len(found) == 1 for found in places.values()), "one side of the split, and one fold"
    assert {fold for ((_, fold),) in places.values()} == {-1, 0, 1, 2, 3}
    train, test = sides(entries)
    assert abs(len(train) - len(test)) < 400


def test_emoji_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'raydml\[demo\]'"):
        emoji()


def test_splits_are_in_the_order_of_the_store() -> None:
    assert SPLITS == ("train", "test", "query", "gallery")


def test_what_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"")
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).rstrip("/").endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    assert len(folder(str(tmp_path))) == 2
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot be read .*Permission denied.*change its permissions"):
        folder(str(tmp_path))


def test_a_name_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    inside = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(inside)
    with open(inside + b"/1.png", "wb"):
        pass
    with pytest.raises(UserError, match="its name is not UTF-8"):
        folder(str(tmp_path))
