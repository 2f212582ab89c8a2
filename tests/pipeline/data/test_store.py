"""The Parquet store: what it holds, what it rejects, and every damage it has to notice."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import prepare
from pipeline.data.entries import Entry
from pipeline.data.image_files import decode
from pipeline.data.prepare_store import describe
from pipeline.data.store import ROW_GROUP, Store
from pipeline.data.write_store import plan_shards, write_store
from pipeline.distributed.jobs import run_serially
from pipeline.errors import RunError, UserError
from pipeline.storage import Folder
from pipeline.testing.tiny import write_images


@pytest.fixture
def copy(store: Store, tmp_path: Path) -> Folder:
    """A store that may be damaged."""
    shutil.copytree(store.folder.path(), tmp_path / "copy")
    return Folder(tmp_path / "copy")


def entries_of(root: Path, classes: dict[str, int], split: str = "train") -> list[Entry]:
    return [Entry(path, name, split) for path, name in write_images(root, classes, seed=1)]


def rejected_lines(folder: Folder) -> list[list[str]]:
    return list(csv.reader(io.StringIO(folder.read("rejected.csv").decode())))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def jpeg(pixels: np.ndarray, **options) -> bytes:
    return encode(Image.fromarray(pixels), "JPEG", quality=95, **options)


# ---- content ---------------------------------------------------------------------------------------------------------


def test_manifest_and_catalogue(store: Store) -> None:
    manifest = json.loads(store.folder.read("manifest.json"))
    train = [3 + i % 5 for i in range(12)] + [1]
    test = [3 + i % 5 for i in range(6)]
    assert manifest["format"] == 1 and manifest["name"] == "tiny" == store.name
    assert manifest["splits"] == {
        "train": {"images": sum(train), "classes": 13},
        "test": {"images": sum(test), "classes": 6},
    }
    assert len(manifest["folds"]) == 4 and sum(f["images"] for f in manifest["folds"]) == sum(train)
    assert [f["classes"] for f in manifest["folds"]] == [4, 3, 3, 3]
    assert manifest["rejected"] == 0 and rejected_lines(store.folder) == [["source", "class", "reason"]]
    assert (
        sum(s["rows"] for s in manifest["shards"]) == sum(train) + sum(test)
        and max(s["rows"] for s in manifest["shards"]) == 16
    )
    for shard in manifest["shards"]:
        data = store.folder.read(shard["file"])
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        table = pq.read_table(io.BytesIO(data))
        assert (
            table.column_names == ["sample_id", "label", "class_name", "split", "source", "image"]
            and len(table) == shard["rows"]
        )
        rows = slice(
            *np.searchsorted(store.sample_id, [table["sample_id"][0].as_py(), table["sample_id"][-1].as_py() + 1])
        )
        np.testing.assert_array_equal(table["label"], store.label[rows])
        assert set(table["split"].to_pylist()) == set(store.split[rows]), "a shard holds one split"
    assert sorted(store.sample_id) == list(range(sum(train) + sum(test))) == store.sample_id.tolist()
    names = [store.class_name_of[int(label)] for label in store.label]
    assert Counter(names) == {f"train{i:02d}": n for i, n in enumerate(train[:12])} | {"train_single": 1} | {
        f"test{i:02d}": n for i, n in enumerate(test)
    }
    assert names == sorted(n for n in names if n.startswith("train")) + sorted(n for n in names if n.startswith("test"))


def test_folds_divide_the_training_classes(store: Store) -> None:
    whole = store.select(["train"])
    folds = [store.select(["train"], fold=f) for f in range(4)]
    assert sorted(i for f in folds for i in f.ids) == whole.ids.tolist(), "covering"
    names = [set(f.class_names) for f in folds]
    assert sum(len(n) for n in names) == len(set().union(*names)) == 13, "class-disjoint"
    for f in range(4):
        rest = store.select(["train"], without_fold=f)
        assert sorted([*rest.ids, *folds[f].ids]) == whole.ids.tolist()
        assert sorted(set(rest.labels)) == list(range(len(rest.class_names))), "labels are dense"
        for i, label in zip(rest.ids, rest.labels, strict=True):
            assert rest.class_names[label] == store.class_name_of[int(store.label[store.sample_id == i][0])]
    assert (store.fold[store.split != "train"] == -1).all()
    assert len(store.select(["gallery"])) == 0 and len(store.select(["train", "test"])) == len(store.sample_id)


@pytest.mark.parametrize("options", [{}, {"fold": 1}, {"without_fold": 2}])
def test_a_selection_row_by_row(store: Store, options: dict[str, int]) -> None:
    """Against a loop over the catalogue; classes of other folds are absent, so that numbers shift."""
    rows = store.folder.fs.open(store.folder.path("catalog.parquet"), "rb")
    ids, labels, names = [], [], []
    for row in pq.read_table(rows).to_pylist():
        kept = row["split"] in ("train", "test")
        kept = kept and options.get("fold", row["fold"]) == row["fold"] != options.get("without_fold")
        if kept:
            if row["class_name"] not in names:
                names.append(row["class_name"])
            ids.append(row["sample_id"])
            labels.append(names.index(row["class_name"]))
    found = store.select(["train", "test"], **options)
    assert found.ids.tolist() == ids and found.labels.tolist() == labels and list(found.class_names) == names
    assert found.labels.dtype == np.int64


def test_layout_keeps_groups_in_one_fold_and_shards_within_a_split() -> None:
    entries = [Entry(f"{c}/{i}", f"c{c:02d}", split, group=f"g{c // 3}") for c in range(30) for i in range(4)
               for split in (["train"] if c < 24 else ["query", "gallery"])]  # fmt: skip
    shards = plan_shards(entries, num_folds=3, images_per_shard=10)
    fold_of: dict[str, set[int]] = {}
    for shard in shards:
        assert len({e.split for e in shard.entries}) == 1 and len(shard.entries) <= 10
        for entry, fold in zip(shard.entries, shard.folds, strict=True):
            fold_of.setdefault(entry.group, set()).add(fold)
    assert all(len(found) == 1 for found in fold_of.values())
    assert Counter(f for found in fold_of.values() for f in found) == {0: 3, 1: 3, 2: 2, -1: 2}
    assert [s.first_id for s in shards] == np.cumsum([0, *(len(s.entries) for s in shards[:-1])]).tolist()
    label_of = {(e.class_name, label) for s in shards for e, label in zip(s.entries, s.labels, strict=True)}
    assert len(label_of) == 30, "query and gallery share the label of a class"
    assert plan_shards(entries[::-1], 3, 10) == shards, "the order of the list does not matter"


def test_bytes_of_a_jpeg_are_kept_and_pixels_of_all(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, {"a": 3, "b": 3})
    jpeg = tmp_path / "a" / "x.jpg"
    Image.open(entries[0].source).save(jpeg, quality=80)
    opened = write_store(
        "x", [*entries, Entry(str(jpeg), "a", "train")], Folder(tmp_path / "store"), run_serially, num_folds=2
    )
    rows = opened.shard_table(opened.manifest["shards"][0]).to_pylist()
    sources = sorted([e.source for e in entries if e.class_name == "a"] + [str(jpeg)]) + [
        e.source for e in entries if e.class_name == "b"
    ]
    for row, source in zip(rows, sources, strict=True):
        if source == str(jpeg):
            assert row["image"] == jpeg.read_bytes()
        else:
            np.testing.assert_array_equal(decode(row["image"]).permute(1, 2, 0), np.asarray(Image.open(source)))


def test_the_same_input_has_the_same_fingerprint_wherever_it_is_written(bucket: str, tmp_path: Path) -> None:
    entries = entries_of(tmp_path, {"a": 3, "b": 2, "c": 1})

    def write(target: Folder, given: list[Entry] = entries, **options: int) -> Store:
        return write_store("x", given, target, run_serially, num_folds=2, **options)

    first = write(Folder(tmp_path / "one"))
    assert write(Folder(tmp_path / "two"), entries[::-1]).fingerprint == first.fingerprint
    remote = write(Folder(bucket) / "data" / "x")
    assert remote.fingerprint == first.fingerprint
    remote.check_shards()
    again = Store(Folder(remote.folder.uri))
    assert again.shard_table(again.manifest["shards"][0]).equals(first.shard_table(first.manifest["shards"][0]))
    assert write(Folder(tmp_path / "three"), entries[1:]).fingerprint != first.fingerprint
    image = Image.open(entries[0].source)
    image.putpixel((0, 0), (1, 2, 3))
    image.save(entries[0].source)
    assert write(Folder(tmp_path / "four")).fingerprint != first.fingerprint, "one pixel"
    second = write(Folder(tmp_path / "one"), images_per_shard=2)
    second.check_shards()
    assert Store(Folder(tmp_path / "one")).fingerprint == second.fingerprint != first.fingerprint, (
        "a store can be made again"
    )


# ---- rejected images -------------------------------------------------------------------------------------------------


def test_rejected_images_leave_gaps_and_are_listed(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, {"a": 4, "b": 3, "gone": 1})
    for name, content in (("a/1.png", b"this is text, with a comma\n"), ("b/0.png", b""), ("gone/0.png", None)):
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    opened = write_store(
        "x", entries, Folder(tmp_path / "store"), run_serially, num_folds=2, images_per_shard=3, max_rejected=0.5
    )
    assert opened.sample_id.tolist() == [0, 2, 3, 5, 6], "the others keep their ids"
    assert opened.manifest["rejected"] == 3 and opened.manifest["splits"]["train"] == {"images": 5, "classes": 2}
    header, *lines = rejected_lines(opened.folder)
    assert header == ["source", "class", "reason"]
    assert [line[:2] for line in lines] == [[str(tmp_path / n), n[:-6]] for n in ("a/1.png", "b/0.png", "gone/0.png")]
    assert all(len(line) == 3 and line[2] and str(tmp_path) not in line[2] for line in lines)
    assert [line[2] for line in lines] == [
        "a text file, not an image: it begins with 'this is text, with a comma'",
        "the file is empty (0 bytes)",
        "there is no such file",
    ]
    opened.check_shards()
    assert any("3 images that cannot be read" in line for line in describe(opened))


def test_more_rejected_images_than_allowed_leave_the_store_as_it_was(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, {"a": 40, "b": 40})
    target = Folder(tmp_path / "store")
    before = write_store("x", entries, target, run_serially, num_folds=2)
    (tmp_path / "a" / "7.png").write_bytes(b"?")
    with pytest.raises(
        UserError,
        match=r"1 of 80 images cannot be read, more than 1.0% allowed; first: .*7\.png.*--max-rejected; the dataset that was there before stays as it was",
    ) as caught:
        write_store("x", entries, target, run_serially, num_folds=2)
    assert "\n" not in str(caught.value)
    assert Store(target).fingerprint == before.fingerprint
    Store(target).check_shards()
    assert len(target.names("shards")) == len(before.manifest["shards"]), "what was written of the new one is removed"
    assert [line[0] for line in rejected_lines(target)[1:]] == [str(tmp_path / "a" / "7.png")]
    assert len(write_store("x", entries, target, run_serially, num_folds=2, max_rejected=0.02).sample_id) == 79


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(folder: Folder, name: str, at: float = 0.5) -> None:
    data = bytearray(folder.read(name))
    data[int(at * len(data))] ^= 0x10
    folder.write(name, bytes(data))


@pytest.mark.parametrize("size", ["truncated", "empty", "missing", "all missing"])
def test_a_shard_of_another_size_is_named_with_both_sizes(size: str, copy: Folder) -> None:
    shard = Store(copy).manifest["shards"][1]
    data = copy.read(shard["file"])
    if size == "all missing":
        shard = Store(copy).manifest["shards"][0]
        copy.remove("shards")
    elif size == "missing":
        copy.remove(shard["file"])
    else:
        copy.write(shard["file"], data[:-7] if size == "truncated" else b"")
    got = {"truncated": f"has {len(data) - 7} bytes", "empty": "has 0 bytes"}.get(size, "is missing")
    with pytest.raises(UserError) as caught:
        Store(copy).check_shards()
    message = str(caught.value)
    assert (
        shard["file"] in message
        and got in message
        and f"says {shard['bytes']} bytes" in message
        and "\n" not in message
    )


def test_a_flipped_bit_in_a_shard_is_found_and_named(copy: Folder) -> None:
    opened = Store(copy)
    shard = opened.manifest["shards"][2]
    flip(copy, shard["file"])
    opened.check_shards()
    with pytest.raises(RunError, match=rf"shard .*{shard['file']} is damaged \(checksum"):
        opened.shard_table(shard)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: flip(f, "catalog.parquet"), "catalog.parquet does not match its checksum"),
        (lambda f: f.remove("catalog.parquet"), "catalog.parquet is missing"),
        (lambda f: f.remove("manifest.json"), "no prepared dataset in .*run `python -m pipeline.prepare`"),
        (lambda f: f.write("manifest.json", f.read("manifest.json")[:-40]), "manifest.json is not valid JSON"),
        (lambda f: f.write("manifest.json", b"\xff\xfe"), "manifest.json is not valid JSON"),
        (lambda f: f.write_json("manifest.json", f.read_json("manifest.json") | {"format": 2}), "store format 2, this program reads format 1: update raydml"),
        (lambda f: f.write_json("manifest.json", {}), "store format None, this program reads format 1"),
    ],
)  # fmt: skip
def test_a_damaged_or_newer_store_is_refused(damage, says: str, copy: Folder) -> None:
    damage(copy)
    with pytest.raises(UserError, match=says) as caught:
        Store(copy)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


def test_row_groups_are_small_enough_for_random_access(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, {"a": ROW_GROUP + 5, "b": 3})
    opened = write_store("x", entries, Folder(tmp_path / "store"), run_serially, num_folds=2)
    file = pq.ParquetFile(opened.folder.path(opened.manifest["shards"][0]["file"]))
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [ROW_GROUP, 8]


# ---- command line (what is refused before Ray starts) ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["folder", "{tmp}/nothing"], "does not exist"),
        (["folder", "{tmp}/images", "--folds", "1"], "--folds has to be at least 2"),
        (["folder", "{tmp}/images", "--max-rejected", "2"], "--max-rejected between 0 and 1"),
        (["folder", "{tmp}/images", "--images-per-shard", "0"], "--images-per-shard at least 1"),
        (["folder", "{tmp}/images", "--folds", "9"], "3 training classes cannot be divided into 9 validation folds"),
        (["folder", "{tmp}/images", "--folds", "2", "--to", "{tmp}/file/store"], "is not writable"),
        (["csv", "{tmp}/nothing.csv"], "cannot be read"),
    ],
)
def test_prepare_refuses_before_ray_starts(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", {f"c{i}": 1 for i in range(6)}, seed=0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYDML_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(prepare, "ray_session", lambda cpus: pytest.fail("Ray was started"))
    assert prepare.main([a.format(tmp=tmp_path) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err and not out
