"""Published datasets in folders and archives, here and in object storage; and what they lack."""

from __future__ import annotations

import tarfile
import unicodedata
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.data import published
from pipeline.data.entries import Entry
from pipeline.data.layouts import LAYOUTS
from pipeline.data.published import list_files, open_sources, read_entries
from pipeline.errors import UserError
from pipeline.storage import Folder
from tests.pipeline import shipped
from tests.pipeline.conftest import contents
from tests.pipeline.shipped import in_order, layout_of, made, missing, read


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped.shrink(monkeypatch)


def folder(name: str, root: Path) -> list[Entry]:
    """What is read from the unpacked folder; see test_layouts."""
    return in_order(read(name, [str(root)], root.parent / "no scratch"))


PACKED = {
    "cub": {"CUB_200_2011.tgz": None},
    "cars": {"car_ims.tgz": ["car_ims"]},
    "cars devkit": {"cars_train.tgz": ["cars_train"], "cars_test.tgz": ["cars_test"], "car_devkit.tgz": ["devkit"]},
    "sop": {"Stanford_Online_Products.zip": None},
    "inshop": {"In-shop Clothes Retrieval Benchmark.zip": None},
    "mars": {"bbox_train.zip": ["bbox_train"], "bbox_test.zip": ["bbox_test"], "MARS-evaluation-master.zip": ["info"]},
    "lpw": {"pep_256x128.tar": None},
}


@pytest.mark.parametrize("name", PACKED)
def test_archives_in_a_folder_are_the_same(name: str, tmp_path: Path) -> None:
    """As they are downloaded: archives, beside them what does not come in one."""
    root, down = made(name, tmp_path / "in"), tmp_path / "down"
    for archive, tops in PACKED[name].items():
        shipped.pack(root, down / archive, tops)
    for loose in root.glob("*.mat"):
        (down / loose.name).write_bytes(loose.read_bytes())
    before = contents(down)
    assert in_order(read(name, [str(down)], tmp_path / "scratch")) == folder(name, root)
    assert contents(down) == before and not list((tmp_path / "scratch").iterdir()), "nothing is left behind"


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_one_archive_of_any_name(suffix: str, tmp_path: Path) -> None:
    root = made("cub", tmp_path / "in")
    archive = shipped.pack(root, tmp_path / f"download (1){suffix}")
    assert in_order(read("cub", [archive], tmp_path / "scratch")) == folder("cub", root)


def test_several_archives_and_folders_together(tmp_path: Path) -> None:
    root = made("mars", tmp_path / "in")
    whole = folder("mars", root)
    parts = [shipped.pack(root, tmp_path / f"{i}.zip", [top]) for i, top in enumerate(("bbox_train", "bbox_test"))]
    (root / "bbox_train").rename(tmp_path / "elsewhere")
    (root / "bbox_test").rename(tmp_path / "elsewhere too")
    assert in_order(read("mars", [*parts, str(root)], tmp_path / "scratch")) == whole


def test_what_lies_unpacked_is_not_unpacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made("cub", tmp_path / "in")
    shipped.pack(root, root / "CUB_200_2011.tgz")
    monkeypatch.setattr(published, "scratch_folder", lambda _: pytest.fail("unpacked"))
    assert len(read("cub", [str(root)], tmp_path / "scratch")) == 12
    assert len(read("cub", [str(root / "CUB_200_2011")], tmp_path / "scratch")) == 12, "or the folder itself"


def test_from_object_storage(bucket: str, tmp_path: Path) -> None:
    root = made("sop", tmp_path / "in")
    for path, data in contents(root).items():
        Folder(bucket).write(f"sop/{path}", data)
    Folder(bucket).write("sop.zip", Path(shipped.pack(root, tmp_path / "sop.zip")).read_bytes())
    with open_sources(LAYOUTS["sop"], [f"{bucket}/sop"], str(tmp_path / "scratch")) as tree:
        entries, lacks = read_entries(LAYOUTS["sop"], tree, False)
    assert (
        sorted(e.source for e in entries) == [f"{bucket}/sop/{e.source}" for e in folder("sop", root)] and lacks == []
    )
    assert in_order(read("sop", [f"{bucket}/sop.zip"], tmp_path / "scratch")) == folder("sop", root)


def test_names_that_a_mac_has_decomposed_are_found(tmp_path: Path) -> None:
    root = made("cub", tmp_path / "in")
    folder = root / "CUB_200_2011" / "images" / "099.Gull é"
    for path in [*folder.iterdir(), folder]:
        path.rename(path.parent / unicodedata.normalize("NFD", path.name))
    with open_sources(LAYOUTS["cub"], [str(root)], str(tmp_path / "scratch")) as tree:
        entries, _ = read_entries(LAYOUTS["cub"], tree, False)
    assert len(entries) == 12 and all(Path(e.source).is_file() for e in entries)
    assert entries[0].class_name == "099.Gull é" == unicodedata.normalize("NFC", "099.Gull é")


def test_hidden_files_are_not_looked_at(tmp_path: Path) -> None:
    root = made("lpw", tmp_path / "in")
    frame = root / "pep_256x128/scen1/view1/1/9.jpg"
    for name in ("__MACOSX/pep_256x128/scen1/view1/1/11.jpg", ".cache/scen1/view1/1/12.jpg"):
        shipped.write(root / name, frame.read_bytes())
    assert len(read("lpw", [str(root)], tmp_path / "scratch")) == 44


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    root = made("sop", tmp_path / "in")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(root)
    assert sorted(list_files(Folder(tmp_path / "here"))) == [
        f"link/{path}" for path in sorted(list_files(Folder(root)))
    ]


# ---- what is missing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped.WRITE)
def test_each_file_that_is_needed_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "scratch_folder", lambda _: nullcontext(tmp_path / "unpacked"))
    root = made(name, tmp_path / "in")
    forms = [form for form in layout_of(name).required_files if ("cars_meta.mat" in form) == (name == "cars devkit")]
    for needed in forms[0]:
        found = next(p for p in root.rglob("*") if p.name == needed.rstrip("/")) if needed != "img/" else root / "Img"
        found.rename(tmp_path / "away")
        text = missing(name, [str(root)], tmp_path / "scratch")
        assert text.startswith(f"{layout_of(name).title}: {needed} is missing in {root}; expected ")
        (tmp_path / "away").rename(found)


def test_at_most_five_are_named_and_how_many_there_are(tmp_path: Path) -> None:
    root = made("mars", tmp_path / "in")
    (root / "bbox_train").rename(tmp_path / "away")
    for path in (root / "info").iterdir():
        path.unlink()
    text = missing("mars", [str(root)], tmp_path / "scratch")
    assert (
        "train_name.txt, test_name.txt, tracks_train_info.mat, tracks_test_info.mat, query_IDX.mat and 1 more are missing"
        in text
    )


def test_an_incomplete_dataset_is_an_error_that_says_what_is_missing(tmp_path: Path) -> None:
    root = made("cub", tmp_path / "in")
    gone = sorted((root / "CUB_200_2011" / "images").rglob("*.jpg"))[:7]
    for path in gone:
        path.unlink()
    text = missing("cub", [str(root)], tmp_path / "scratch")
    assert "CUB-200-2011 is not complete: 7 of 12 listed images are missing" in text
    assert "train: 0 of 6 images, 0 of 2 classes; test: 5 of 6 images (" in text
    assert all(path.name in text for path in gone[:5]) and not any(path.name in text for path in gone[5:])
    assert "and 2 more are missing" in text and "--partial" in text


def test_a_partial_dataset_says_what_it_lacks(tmp_path: Path) -> None:
    root = made("mars", tmp_path / "in")
    (root / "bbox_test" / "0004" / "0004C5T0006F001.jpg").unlink()
    (root / "bbox_train" / "0003" / "0003C1T0003F001.jpg").unlink()
    with open_sources(LAYOUTS["mars"], [str(root)], str(tmp_path / "scratch")) as tree:
        entries, lacks = read_entries(LAYOUTS["mars"], tree, True)
    assert len(entries) == 18 and lacks == [
        "2 of 20 listed images are missing",
        "train: 7 of 8 images, 2 of 3 classes, 3 of 4 tracks",
        "query+gallery: 11 of 12 images, 5 of 6 tracks",
    ]


def test_more_than_there_should_be_is_also_another_dataset(tmp_path: Path) -> None:
    root = made("lpw", tmp_path / "in")
    shipped.write(root / "pep_256x128/scen2/view1/3/1.jpg", b"x")
    assert "train: 33 of 32 images, 5 of 4 classes:" in missing("lpw", [str(root)], tmp_path / "scratch")


def test_a_dataset_of_nothing_is_an_error_even_if_it_may_be_partial(tmp_path: Path) -> None:
    root = made("sop", tmp_path / "in")
    for path in root.rglob("*.JPG"):
        path.unlink()
    with pytest.raises(UserError, match="Stanford Online Products: none of its 12 listed images is there"):
        read("sop", [str(root)], tmp_path / "scratch", partial=True)


def test_what_an_archive_lacks_is_told_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made("cub", tmp_path / "in")
    (root / "CUB_200_2011" / "classes.txt").unlink()
    monkeypatch.setattr(published, "scratch_folder", lambda _: pytest.fail("unpacked"))
    for name in ("x.zip", "x.tar"):
        text = missing("cub", [shipped.pack(root, tmp_path / name)], tmp_path / "scratch")
        assert "CUB-200-2011: classes.txt is missing in" in text


@pytest.mark.parametrize("spelling", ["./{}", "{}"])
def test_names_as_tar_and_windows_spell_them(spelling: str, tmp_path: Path) -> None:
    root = made("cub", tmp_path / "in")
    names = sorted(contents(root))
    with tarfile.open(tmp_path / "x.tar", "w") as tar, zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        for name in names:
            tar.add(root / name, spelling.format(name))
            info = zipfile.ZipInfo("member")
            info.filename = spelling.format(name).replace("/", "\\")
            zipped.writestr(info, (root / name).read_bytes())
    for archive in ("x.tar", "x.zip"):
        assert in_order(read("cub", [str(tmp_path / archive)], tmp_path / "scratch")) == folder("cub", root)


def test_a_compressed_archive_that_lacks_something(tmp_path: Path) -> None:
    root = made("cub", tmp_path / "in")
    (root / "CUB_200_2011" / "classes.txt").unlink()
    text = missing("cub", [shipped.pack(root, tmp_path / "x.tgz")], tmp_path / "scratch")
    assert "classes.txt is missing in" in text and not list((tmp_path / "scratch").iterdir())


def test_the_devkit_without_labels_of_the_test_images(tmp_path: Path) -> None:
    root = made("cars devkit", tmp_path / "in")
    (root / "cars_test_annos_withlabels.mat").rename(root / "devkit" / "cars_test_annos.mat")
    assert "cars_test_annos_withlabels.mat is missing" in missing("cars", [str(root)], tmp_path / "scratch")


@pytest.mark.parametrize(
    ("source", "says"),
    [("{tmp}/nothing", "does not exist"), ("{tmp}/in/attributes.txt", "is neither a folder nor an archive")],
)
def test_sources_that_are_none(source: str, says: str, tmp_path: Path) -> None:
    made("cub", tmp_path / "in")
    assert says in missing("cub", [source.format(tmp=tmp_path)], tmp_path / "scratch")


def test_two_copies_in_one_folder_are_ambiguous(tmp_path: Path) -> None:
    for copy in ("2010", "2011"):
        made("cub", tmp_path / "in" / copy)
    text = missing("cub", [str(tmp_path / "in")], tmp_path / "scratch")
    assert "2010/CUB_200_2011/images.txt and in 2011/CUB_200_2011/images.txt" in text and "--from" in text


def test_boxes_are_asked_for_only_when_wanted(tmp_path: Path) -> None:
    root = made("cub", tmp_path / "in")
    (root / "CUB_200_2011" / "bounding_boxes.txt").unlink()
    assert {e.box for e in read("cub", [str(root)], tmp_path / "scratch")} == {None}
    with (
        pytest.raises(UserError, match=r"CUB-200-2011: bounding_boxes\.txt is missing"),
        open_sources(LAYOUTS["cub"].with_boxes(), [str(root)], str(tmp_path / "scratch")),
    ):
        pass
    assert LAYOUTS["cars"].with_boxes() == LAYOUTS["cars"]
    for name in ("sop", "mars", "lpw"):
        with pytest.raises(UserError, match="has no boxes: leave out --crop box"):
            LAYOUTS[name].with_boxes()
