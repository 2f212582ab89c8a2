"""A disk that takes no more data: one line that says where, and what was there before stays."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.cache import Cache, open_local_copy
from pipeline.data.entries import Entry
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.errors import RunError
from pipeline.storage import Folder, disk_full_as_error
from pipeline.testing.tiny import write_images


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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_only_a_lack_of_room_is_told_so(number: int) -> None:
    says = r"^/x/y \(3\.0 MB\) cannot be written: .*" + os.strerror(number)
    with pytest.raises(RunError, match=says), disk_full_as_error("/x/y", 3_000_000):
        raise OSError(number, os.strerror(number))
    with pytest.raises(PermissionError), disk_full_as_error("/x/y", 3_000_000):
        raise PermissionError(errno.EACCES, "no")


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
