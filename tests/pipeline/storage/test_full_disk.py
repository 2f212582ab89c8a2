"""A disk that takes no more data: one line that says where, and what was there before stays."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import evaluate, report, train
from pipeline.data.cache import Cache, open_local_copy
from pipeline.data.entries import Entry
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.errors import RunError
from pipeline.storage import Folder, disk_full_as_error
from pipeline.testing.tiny import write_images
from tests.pipeline.conftest import Base


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may become larger than 2,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_has_no_room_leaves_the_old_one(small_files: None, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "some")
    folder.write("x", b"old")
    with pytest.raises(RunError, match=rf"^{tmp_path}/some/x \(0\.0 MB\) cannot be written: it is larger .*make room"):
        folder.write("x", bytes(5000))
    with pytest.raises(RunError, match="/some/y "):
        folder.write_together({"x": b"new", "y": bytes(5000)})
    assert folder.read("x") == b"old" and folder.names() == ["x"], "neither, and nothing unfinished"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES])
def test_only_a_lack_of_room_or_of_rights_is_told_so(number: int) -> None:
    says = r"^/x/y \(3\.0 MB\) cannot be written: .*" + os.strerror(number)
    with pytest.raises(RunError, match=says), disk_full_as_error("/x/y", 3_000_000):
        raise OSError(number, os.strerror(number))
    with pytest.raises(OSError, match="no"), disk_full_as_error("/x/y", 3_000_000):
        raise OSError(errno.EIO, "no")


def entries(root: Path, seed: int) -> list[Entry]:
    return [Entry(path, name, "train") for path, name in write_images(root, {"a": 3, "b": 3}, seed)]


def test_a_store_that_has_no_room_leaves_the_earlier_one(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    target = Folder(tmp_path / "store")
    before = write_store("x", entries(tmp_path / "one", 1), target, run_serially, num_folds=2)
    files = {name: target.read(f"shards/{name}") for name in target.names("shards")}
    more = entries(tmp_path / "two", 2)
    request.getfixturevalue("small_files")
    with pytest.raises(RunError, match=r"store/shards/train-00000-2\.parquet .*cannot be written"):
        write_store("x", more, target, run_serially, num_folds=2)
    assert Store(target).fingerprint == before.fingerprint
    assert {name: target.read(f"shards/{name}") for name in target.names("shards")} == files


def test_a_copy_that_has_no_room_leaves_nothing(store: Store, small_files: None, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"^{tmp_path}/cache/tiny-.*cannot be written: it is larger"):
        open_local_copy(store, Cache(str(tmp_path / "cache"), 2**30), "train")
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.name != ".lock"] == []


def test_a_report_that_has_no_room_leaves_the_earlier_one(
    base: Base, small_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of a finished run whose first report it would have been: `report` writes it when there is room."""
    before = base.run.read("report.html")
    assert report.main([base.run.uri]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {base.run}/report.html (") and "make room" in lines[0]
    assert base.run.read("report.html") == before and not [n for n in base.run.names() if n.endswith(".part")]


def test_embeddings_that_have_no_room_are_finished_later(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    target = Folder(tmp_path / "out")
    command = [base.run.uri, "--split", "all", "--embed-to", target.uri, "--workers", "0"]
    request.getfixturevalue("small_files")
    assert evaluate.main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {target}/part-000000000.parquet (") and "make room" in last
    assert target.names() == ["_embeddings.json"] and not target.read_json("_embeddings.json")["complete"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert evaluate.main(command) == 0
    assert target.read_json("_embeddings.json")["complete"] and target.names() == [
        "_embeddings.json",
        "part-000000000.parquet",
    ]


def test_a_read_only_storage_is_one_line_before_the_start(
    base: Base, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", read_only)
    before = base.files()
    assert train.main([base.recipe({"name": "new"})]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: storage ") and "is not writable" in last and "the disk is read-only" in last
    assert report.main([base.run.uri]) == 2
    assert "the disk is read-only" in capsys.readouterr().err
    assert {name: data for name, data in base.files().items() if "/new" not in name} == before
