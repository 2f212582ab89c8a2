"""The same calls for a local folder and for object storage."""

from __future__ import annotations

import os
import pickle
import threading
import time
from pathlib import Path

import pytest
import s3fs

from pipeline.errors import RunError, UserError
from pipeline.storage import Folder, read_file
from pipeline.storage import folder as folder_module
from pipeline.storage.s3 import S3


def test_files_and_folders(folder: Folder) -> None:
    assert not folder.exists() and not folder.exists("a.txt") and folder.names() == []
    folder.write("b/c/d.bin", b"123")
    folder.write("b/a.txt", b"")
    folder.write("b/c/d.bin", b"12345")  # replaces
    assert folder.exists() and folder.exists("b") and folder.exists("b/c/d.bin") and not folder.exists("b/x")
    assert folder.names() == ["b"] and folder.names("b") == ["a.txt", "c"] and folder.names("nothing") == []
    assert folder.read("b/c/d.bin") == b"12345" and folder.size("b/c/d.bin") == 5 and folder.size("b/a.txt") == 0
    assert (folder / "b" / "c").read("d.bin") == b"12345"
    with pytest.raises(FileNotFoundError):
        folder.read("b/nothing")
    again = pickle.loads(pickle.dumps(folder))
    assert again.uri == folder.uri == str(folder) and again.read("b/c/d.bin") == b"12345"


def test_versions_of_files(folder: Folder) -> None:
    folder.write("sub/a", b"1")
    folder.write("sub/deep/b", b"1")
    first = folder.versions("sub")
    assert set(first) == {"a"} and folder.versions("sub") == first and folder.versions("nothing") == {}
    assert abs(first["a"].written - time.time()) < 60
    folder.write("sub/a", b"2")
    assert folder.versions("sub")["a"] != first["a"]


def test_lists_and_parts(folder: Folder) -> None:
    data = bytes(range(200))
    for name in ("x", "sub/y", "sub/deep/z"):
        folder.write(name, data)
    folder.write("sub/empty", b"")
    assert folder.find() == ["sub/deep/z", "sub/empty", "sub/y", "x"] and (folder / "nothing").find() == []
    assert folder.sizes("sub") == {"empty": 0, "y": 200} and folder.sizes("nothing") == {}
    assert folder.read_range("x", 10, 20) == data[10:20] and folder.read_range("x", 200, 200) == b""
    assert folder.read("sub/empty") == b"" and read_file(f"{folder}/sub/y") == data
    with folder.open("x") as file:
        assert file.seek(-5, os.SEEK_END) == 195 and file.read(3) == data[195:198] and file.tell() == 198
        assert file.read(100) == data[198:] and file.read(100) == b"" and file.seek(300) == 300 and file.read(1) == b""
        assert file.seek(0) == 0 and file.seek(2, os.SEEK_CUR) == 2 and file.read() == data[2:]
    with pytest.raises(FileNotFoundError):
        folder.open("nothing")


def test_a_part_beyond_the_end(tmp_path: Path) -> None:
    Folder(tmp_path).write("x", b"123")
    with pytest.raises(RunError, match=f"^{tmp_path}/x gave 2 of 4 bytes from 1: copy it again$"):
        Folder(tmp_path).read_range("x", 1, 5)


def test_remove(folder: Folder) -> None:
    for name in ("keep", "file", "sub/x", "sub/deep/y"):
        folder.write(name, b"1")
    folder.remove("nothing")
    folder.remove("file")
    folder.remove("sub")
    assert folder.names() == ["keep"] and not folder.exists("sub/deep/y")
    folder.remove()
    assert not folder.exists() and folder.names() == []
    folder.remove()


def test_what_another_process_wrote_is_seen_at_once(folder: Folder) -> None:
    """No listing is remembered: a resumed run looks for checkpoints that someone else wrote."""
    other = folder.fs if folder.is_local else s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    path = folder.path("checkpoints/step-1/x")
    folder.write("checkpoints/step-0/x", b"0")
    assert folder.names("checkpoints") == ["step-0"] and not folder.exists("checkpoints/step-1")
    other.makedirs(path.rpartition("/")[0], exist_ok=True)
    other.pipe_file(path, b"1")
    assert folder.names("checkpoints") == ["step-0", "step-1"] and folder.exists("checkpoints/step-1/x")
    assert folder.size("checkpoints/step-1/x") == 1
    other.rm_file(path)
    assert not folder.exists("checkpoints/step-1/x") and folder.names("checkpoints/step-1") == []


def test_json(folder: Folder) -> None:
    value = {"a": [1, 2.5, None], "b": {"ü": "x"}}
    folder.write_json("x.json", value)
    assert folder.read_json("x.json") == value
    for damaged in (b'{"a": ', b"", b'{"a": "\xff"}'):
        folder.write("x.json", damaged)
        with pytest.raises(UserError, match=r"x\.json is not valid JSON .*restore it or start over") as caught:
            folder.read_json("x.json")
        assert "\n" not in str(caught.value)


def test_check_writable_leaves_nothing(folder: Folder) -> None:
    folder.check_writable()
    (folder / "runs" / "new").check_writable()
    assert folder.names() == []


@pytest.mark.parametrize("kind", ["below a file", "missing bucket", "unknown protocol", "no server"])
def test_unwritable_storage_is_one_line(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "file").write_bytes(b"")
    uri = {"below a file": f"{tmp_path}/file/runs", "missing bucket": "s3://no-such-bucket/runs", "unknown protocol": "s4://b/runs",
           "no server": "s3://bucket/runs"}[kind]  # fmt: skip
    if kind in ("missing bucket", "no server"):
        request.getfixturevalue("bucket")
    if kind == "no server":
        patch = request.getfixturevalue("monkeypatch")
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setenv("RAYDML_S3_RETRY_TIMEOUT_S", "0")
        S3.clear_instance_cache()
    with pytest.raises(UserError) as caught:
        Folder(uri).check_writable()
    assert uri in str(caught.value) and "\n" not in str(caught.value)


def test_local_uris_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/house")
    assert Folder("a/../b/").uri == f"{tmp_path}/b"
    assert Folder("~/x").uri == "/house/x"
    assert Folder(f"file://{tmp_path}/y").path("z") == f"{tmp_path}/y/z"
    assert Folder("/").uri == "/" and Folder("/").path("x") == "/x"
    assert (
        Folder("s3://b/c/").uri == "s3://b/c"
        and Folder("s3://b/c").path("d") == "b/c/d"
        and not Folder("s3://b").is_local
    )


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    folder.write("x", b"old")

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(folder_module.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        folder.write("x", b"new, longer")
    assert folder.read("x") == b"old" and os.listdir(tmp_path) == ["x"]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    versions = [bytes([i]) * 300_000 for i in range(2)]
    folder.write("x", versions[0])
    stop = threading.Event()

    def write() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            folder.write("x", versions[i % 2])

    writers = [threading.Thread(target=write) for _ in range(2)]
    for thread in writers:
        thread.start()
    try:
        seen = {folder.read("x") for _ in range(300)}
    finally:
        stop.set()
        for thread in writers:
            thread.join()
    assert seen <= set(versions)
