"""What users really have: untidy folders and lists of other tools become the dataset that they mean, or one sentence."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.data.entries import Entry
from pipeline.data.own_images import folder, table
from pipeline.data.store import Store
from pipeline.data.write_store import plan_shards
from pipeline.errors import UserError
from pipeline.storage import Folder
from pipeline.testing.tiny import write_images
from tests.pipeline.conftest import Cli


def touch(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def by_class(entries: list[Entry]) -> dict[str, int]:
    return dict(Counter(e.class_name for e in entries))


def by_split(entries: list[Entry]) -> dict[str, set[str]]:
    return {split: {e.class_name for e in entries if e.split == split} for split in {e.split or "" for e in entries}}


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_files_that_are_no_images_are_passed_over_with_a_count(tmp_path: Path) -> None:
    litter = ("a/Thumbs.db", "a/desktop.ini", "README", "labels.csv", "b/notes.txt", "b/x.aae")
    found = folder(touch(tmp_path, "a/1.jpg", "a/2", "b/1.PNG", "b/readme.png", *litter, "__MACOSX/a/._1.jpg"))
    assert by_class(found.entries) == {"a": 2, "b": 2}
    assert any(note.startswith("6 files that are no images passed over: ") for note in found.notes)


def test_empty_class_folders_and_images_of_no_class_are_told(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg", "stray.jpg", "c/list.txt")
    (tmp_path / "d").mkdir()
    found = folder(str(tmp_path))
    assert by_class(found.entries) == {"a": 1, "b": 1}
    assert "2 class folders without an image: 'c', 'd'" in found.notes
    assert "1 image in no class folder left out (first: stray.jpg)" in found.notes


def test_images_in_subfolders_belong_to_their_class_or_to_the_level_that_is_asked_for(tmp_path: Path) -> None:
    root = touch(tmp_path, "cam1/ann/1.jpg", "cam1/bob/1.jpg", "cam2/ann/1.jpg", "cam2/ann/deep/2.jpg")
    found = folder(root)
    assert by_class(found.entries) == {"cam1": 2, "cam2": 2}
    assert any("4 images lie in subfolders" in n and "add --class-level 2" in n for n in found.notes)
    assert by_class(folder(root, class_level=2).entries) == {"ann": 3, "bob": 1}


def test_a_wrapper_folder_is_not_the_class(tmp_path: Path) -> None:
    found = folder(touch(tmp_path, "photos/images/a/1.jpg", "photos/images/b/1.jpg", "photos/README.txt"))
    assert by_class(found.entries) == {"a": 1, "b": 1}
    assert f"the class folders are those in {tmp_path}/photos/images" in found.notes


def test_split_folders_are_splits(tmp_path: Path) -> None:
    touch(tmp_path, *(f"Train/a{i}/1.jpg" for i in range(3)), "test/b/1.jpg", "test/b/more/2.jpg")
    assert by_split(folder(str(tmp_path)).entries) == {"train": {"a0", "a1", "a2"}, "test": {"b"}}
    assert not folder(str(tmp_path), resplit=True).splits_given
    touch(tmp_path, "valid/v/1.jpg", "valid/a0/2.jpg")
    found = folder(str(tmp_path))
    assert by_split(found.entries) == {"train": {"a0", "a1", "a2", "v"}, "test": {"b"}}
    folds = {e.class_name: f for s in plan_shards(found.entries, 3, 9) for e, f in zip(s.entries, s.folds, strict=True)}
    assert folds["v"] == 0 and {folds[f"a{i}"] for i in range(3)} == {1, 2}, "validation classes alone are fold 0"
    assert any("fold 0" in note for note in found.notes) and any("share 1 class" in note for note in found.notes)


def test_validation_alone_is_the_test_and_query_and_gallery_are_known(tmp_path: Path) -> None:
    found = folder(touch(tmp_path / "v", "train/a/1.jpg", "val/b/1.jpg"))
    assert by_split(found.entries) == {"train": {"a"}, "test": {"b"}}
    found = folder(touch(tmp_path / "q", "train/a/1.jpg", "query/b/1.jpg", "gallery/b/2.jpg"))
    assert by_split(found.entries) == {"train": {"a"}, "query": {"b"}, "gallery": {"b"}}


def test_classes_on_both_sides_are_refused_with_a_way_out(tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"{s}/c{i}/{s}.jpg" for s in ("train", "test") for i in range(4)))
    with pytest.raises(UserError, match=r"4 classes are in train and in a test split .*add --resplit"):
        folder(root)
    assert {len(names) for names in by_split(folder(root, resplit=True).entries).values()} == {2}


def test_links_are_followed_broken_ones_listed_and_loops_refused(tmp_path: Path) -> None:
    touch(tmp_path / "real", "a/1.jpg", "b/1.jpg")
    root = tmp_path / "links"
    root.mkdir()
    for name in "ab":
        (root / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real/a/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = folder(str(root))
    assert by_class(found.entries) == {"a": 1, "b": 1}
    assert found.left_out == ((f"{root}/a/gone.jpg", "a", "a link to a file that does not exist"),)
    (tmp_path / "real/b/loop").symlink_to(root)
    with pytest.raises(UserError, match="b/loop is a link to a folder that it lies in, a loop"):
        folder(str(root))


def test_names_that_differ_invisibly_are_one_class(tmp_path: Path) -> None:
    found = folder(touch(tmp_path, "café/1.jpg", "cafe\u0301/2.jpg", "007/1.jpg", "7/1.jpg", "Cat/1.jpg", "cat/1.jpg"))
    assert by_class(found.entries) == {"café": 2, "007": 1, "7": 1, "Cat": 1, "cat": 1}
    assert any(n.startswith("1 class merged") and "'café'" in n for n in found.notes)
    assert any("upper and lower case (first: 'Cat' and 'cat')" in n for n in found.notes)


# ---- lists -----------------------------------------------------------------------------------------------------------


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_columns_of_other_tools(tmp_path: Path) -> None:
    rows = "a.jpg,x,train,,\nb.jpg,y,validation,1,0\nc.jpg,y,validation,0.0,True\nd.jpg,z,validation,yes,no\ne.jpg,z,validation,0,1\n"
    found = table(write(tmp_path / "l.csv", "filename,class,split,is_query,is_gallery\n" + rows))
    assert by_split(found.entries) == {"train": {"x"}, "query": {"y", "z"}, "gallery": {"y", "z"}}
    assert "columns taken: filename as path, class as label" in found.notes
    found = table(write(tmp_path / "m.csv", "path,label,width,category\na.jpg,x,1,2\nb.jpg,y,3,4\n"))
    assert by_class(found.entries) == {"x": 1, "y": 1}
    assert "columns passed over: width, category" in found.notes
    found = table(str(tmp_path / "m.csv"), columns={"label": "category"})
    assert by_class(found.entries) == {"2": 1, "4": 1}


@pytest.mark.parametrize(("name", "mark"), [("comma", ","), ("semicolon", ";"), ("tab", "\t")])
def test_separators_by_name_and_text_of_spreadsheets(name: str, mark: str, tmp_path: Path) -> None:
    text = f"path{mark}label\n\na.jpg{mark} x \nsub\\b.jpg{mark}y\n"
    found = table(write(tmp_path / "l.csv", text, "utf-16"), separator=name, root=str(tmp_path / "img"))
    assert [(e.source, e.class_name) for e in found.entries] == [
        (f"{tmp_path}/img/a.jpg", "x"),
        (f"{tmp_path}/img/sub/b.jpg", "y"),
    ]
    assert "1 path written with backslashes: read as folders" in found.notes


def test_rows_that_repeat_are_left_out_with_a_count(tmp_path: Path) -> None:
    found = table(write(tmp_path / "l.csv", "path,label\na.jpg,x\nb.jpg,y\n./a.jpg,x\na.jpg,x\n"))
    assert by_class(found.entries) == {"x": 1, "y": 1}
    assert any(note.startswith("2 rows left out that repeat") for note in found.notes)


def test_a_query_does_not_find_itself(tmp_path: Path) -> None:
    rows = "".join(f"{c}{i}.jpg,{c},{s}\n" for c in "xy" for i in range(2) for s in ("query", "gallery"))
    found = table(write(tmp_path / "same.csv", "path,label,split\n" + rows))
    assert by_split(found.entries) == {"test": {"x", "y"}} and len(found.entries) == 4
    found = table(write(tmp_path / "more.csv", "path,label,split\n" + rows + "x9.jpg,x,gallery\n"))
    assert Counter(e.split for e in found.entries) == {"query": 4, "gallery": 1}
    assert any("4 queries are in the gallery too" in note for note in found.notes)


def test_cameras_make_re_identification_and_tracks_are_unique(tmp_path: Path) -> None:
    rows = "".join(
        f"{p}{c}{i}.jpg,{p},{s},{c},1\n"
        for p, s in (("a", "train"), ("b", "test"))
        for c in ("left", "right")
        for i in "01"
    )
    found = table(write(tmp_path / "l.csv", "path,pid,split,camid,track\n" + rows))
    assert found.protocol == "reid" and by_split(found.entries) == {"train": {"a"}, "query": {"b"}}
    assert {e.camera for e in found.entries} == {0, 1} and len({e.track for e in found.entries}) == 4
    assert any("re-identification" in note for note in found.notes)
    assert table(str(tmp_path / "l.csv"), columns={"camera": "", "track": ""}).protocol is None
    found = table(write(tmp_path / "one.csv", "path,label,camera\na.jpg,x,7\nb.jpg,y,7\n"))
    assert found.protocol is None and found.entries[0].camera is None


# ---- the command -----------------------------------------------------------------------------------------------------


def photos(root: Path, names: str, seed: int = 0) -> Path:
    write_images(root, dict.fromkeys(names, 3), seed)
    return root


def test_few_classes_have_as_many_folds_and_fewer_a_way_out(cli: Cli, tmp_path: Path) -> None:
    status, said = cli("folder", photos(tmp_path / "six", "abcdef"))
    assert status == 0 and "note: 3 training classes: 3 validation folds instead of 4" in said
    assert "a validation fold of one class cannot choose a checkpoint" in said
    for number in (1, 2, 3):
        status, said = cli("folder", photos(tmp_path / f"few{number}", "abc"[:number]))
        assert status == 2 and "at least 4" in said and f"few{number}/train/CLASS" in said
    photos(tmp_path / "split" / "train", "abc")
    status, said = cli("folder", tmp_path / "split")
    assert status == 0 and "train: 9 images, 3 classes" in said, "the way out"
    status, said = cli("folder", photos(tmp_path / "one" / "train", "a").parent)
    assert status == 2 and "there is one training class, 'a'" in said


def test_a_dataset_to_be_measured_on_only(cli: Cli, tmp_path: Path) -> None:
    photos(tmp_path / "only" / "test", "ab")
    status, said = cli("folder", tmp_path / "only")
    assert status == 0 and "no training images: a dataset to be measured on only" in said
    store = Store(Folder(tmp_path / "home/data/only"))
    assert store.manifest["folds"] == [] and len(store.select(["test"])) == 6


def test_another_dataset_is_not_replaced_without_a_word(cli: Cli, tmp_path: Path) -> None:
    first, second = photos(tmp_path / "one/photos", "abcd"), photos(tmp_path / "two/photos", "abcd", seed=9)
    assert cli("folder", first)[0] == 0
    before = Store(Folder(tmp_path / "home/data/photos")).fingerprint
    status, said = cli("folder", second)
    assert status == 2 and f"{first}; keep both with --to {tmp_path}/home/data/photos-2, or add --replace" in said
    assert Store(Folder(tmp_path / "home/data/photos")).fingerprint == before
    assert cli("folder", second, "--to", f"{tmp_path}/home/data/photos-2")[0] == 0
    status, said = cli("folder", second, "--replace")
    assert status == 0 and "replacing photos" in said
    write_images(second, {"e": 2, "f": 2}, seed=3)
    status, said = cli("folder", second)
    assert status == 0 and "prepared from the same folder before" in said, "the same folder may have grown"
    store = Store(Folder(tmp_path / "home/data/photos"))
    files = {shard["file"].removeprefix("shards/") for shard in store.manifest["shards"]}
    assert set(store.folder.names("shards")) == files, "nothing of the earlier store is left"


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("photos", "would lie among its images"),
        ("photos/store", "would lie among its images"),
        ("full", "is not empty and holds no dataset"),
        ("home/data/emoji", "is the place of the built-in demo"),
    ],
)
def test_places_that_no_store_may_take(target: str, says: str, cli: Cli, tmp_path: Path) -> None:
    touch(tmp_path, "full/letter.txt")
    status, said = cli("folder", photos(tmp_path / "photos", "abcd"), "--to", tmp_path / target)
    assert status == 2 and says in said and "--to" in said
    assert not (tmp_path / target / "manifest.json").exists()


def test_a_folder_called_emoji_is_not_the_demo(cli: Cli, tmp_path: Path) -> None:
    status, said = cli("folder", photos(tmp_path / "emoji", "abcd"))
    assert status == 2 and f"--to {tmp_path}/home/data/my-emoji" in said


def test_copies_are_counted_and_leaks_are_loud(cli: Cli, tmp_path: Path) -> None:
    root = photos(tmp_path / "copies", "abcd")
    store_of = Folder(tmp_path / "home/data/copies")
    for name in "bcd":
        shutil.copy(root / "a/0.png", root / name / "again.png")
    shutil.copy(root / "a/1.png", root / "a/again.png")
    status, said = cli("folder", root)
    assert status == 0 and "copies: 4 images are copies of others, with the same bytes" in said
    assert "WARNING: 1 image is in more than one class" in said and "WARNING: 1 image is in train and in test" in said
    assert Store(store_of).manifest["copies"] == {
        "repeated": 4, "several_classes": 1, "train_and_test": 1, "query_and_gallery": 0,
    }  # fmt: skip
    lines = store_of.read("copies.csv").decode().splitlines()
    assert len(lines) == 7 and len({line.split(",")[0] for line in lines[1:]}) == 2
    for name in "bcd":
        (root / name / "again.png").unlink()
    (root / "a/again.png").unlink()
    assert cli("folder", root)[0] == 0 and not store_of.exists("copies.csv")


def test_a_copy_of_a_query_in_the_gallery_is_junk(cli: Cli, tmp_path: Path) -> None:
    root = photos(tmp_path / "img", "abcd")
    shutil.copy(root / "c/0.png", root / "c/again.png")
    rows = [f"img/{c}/{i}.png,{c},train" for c in "ab" for i in range(3)]
    rows += [f"img/{c}/{i}.png,{c},{'gallery' if i else 'query'}" for c in "cd" for i in range(3)]
    status, said = cli(
        "csv", write(tmp_path / "l.csv", "\n".join(["path,label,split", *rows, "img/c/again.png,c,gallery"]))
    )
    assert status == 0 and "1 gallery image is a copy of a query, which would find itself: junk" in said
    assert Store(Folder(tmp_path / "home/data/l")).manifest["splits"]["gallery"] == {
        "images": 5,
        "classes": 2,
        "junk": 1,
    }


def test_names_are_printed_as_they_are_and_images_traced(cli: Cli, tmp_path: Path) -> None:
    root = photos(tmp_path / "a [", "abcd")
    target = tmp_path / "x [" / "red] :cat: [b]"
    status, said = cli("folder", root, "--to", target)
    assert status == 0 and f"({Store(Folder(target)).fingerprint}): {target}\n" in said
    store = Store(Folder(target))
    sources = store.sources(store.sample_id)
    assert sources is not None and all(Path(source).is_file() for source in sources)
    assert [Path(s).parent.name for s in sources] == [store.class_name_of[int(label)] for label in store.label]
    shard = pq.read_table(target / store.manifest["shards"][0]["file"])
    assert shard["source"].to_pylist() == sources[: len(shard)]
    shutil.move(root, tmp_path / "elsewhere")
    assert cli("folder", tmp_path / "elsewhere")[0] == 0
    assert Store(Folder(tmp_path / "home/data/elsewhere")).fingerprint == store.fingerprint, "wherever the images lie"
