"""This node's copies of training splits: made once, bounded, never taken away while in use, damage is named."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import Config
from pipeline.data import cache as cache_module
from pipeline.data.cache import Cache, CacheFull, MappedReader, open_local_copy, split_bytes
from pipeline.data.reader import RowGroupReader, open_reader
from pipeline.data.store import Store
from pipeline.errors import RunError
from pipeline.storage import Folder
from pipeline.training.parts import image_source
from tests.pipeline.data.test_reader import bytes_of, flip_image_byte, small_store
from tests.pool import Pool

pytestmark = pytest.mark.usefixtures("fresh_readers")
PLENTY = 2**30


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def test_it_is_made_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(str(tmp_path / "deep" / "cache"), PLENTY)
    path = open_local_copy(store, cache, "train").path
    assert store.fingerprint in path.name
    made = path.stat()
    monkeypatch.setattr(Store, "shard_table", lambda *_: pytest.fail("read again"))
    assert open_local_copy(store, cache, "train").path == path
    assert path.stat().st_ino == made.st_ino
    assert copies(path.parent) == [path] and not list(path.parent.glob("*.part"))


def test_threads_that_start_together_make_it_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    original = Store.shard_table
    monkeypatch.setattr(
        Store, "shard_table", lambda self, record: (reads.append(record["file"]), original(self, record))[1]
    )
    barrier = threading.Barrier(6)

    def make(_: int) -> Path:
        barrier.wait()
        return open_local_copy(store, Cache(str(tmp_path / "cache"), PLENTY), "train").path

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(make, range(6)))) == 1
    assert sorted(reads) == sorted(s["file"] for s in store.manifest["shards"] if "train" in s["file"]), (
        "each shard once"
    )


def read_in_process(
    rank: int, world: int, uri: str, fingerprint: str, cache: Cache, ids: np.ndarray
) -> tuple[int, list[bytes]]:
    data = open_reader(uri, fingerprint, cache).read(ids)
    (path,) = copies(Path(cache.folder))
    return path.stat().st_ino, data


@pytest.mark.cluster
def test_processes_that_start_together_share_one(pool: Pool, store: Store, tmp_path: Path) -> None:
    ids, images = store.select(["train"]).ids, bytes_of(store)
    cache = Cache(str(tmp_path / "cache"), PLENTY)
    results = pool(read_in_process, 3, store.folder.uri, store.fingerprint, cache, ids)
    assert len({inode for inode, _ in results}) == 1
    assert all(data == [images[i] for i in ids] for _, data in results)
    assert not list((tmp_path / "cache").glob("*.part"))


SLOW_BUILDER = """
import sys, time
from pipeline.data.cache import Cache, open_local_copy
from pipeline.data.store import Store
from pipeline.storage import Folder
read = Store.shard_table
def slow(self, record):
    if record["file"].endswith("00002.parquet"):
        time.sleep(60)
    return read(self, record)
Store.shard_table = slow
open_local_copy(Store(Folder(sys.argv[1])), Cache(sys.argv[2], 2**30), "train")
"""


@pytest.mark.cluster
def test_a_builder_killed_half_way(tmp_path: Path) -> None:
    """Whoever waits for it takes over, and clears away what it left."""
    store, images = small_store(tmp_path, classes=6)
    folder = tmp_path / "cache"
    builder = subprocess.Popen([sys.executable, "-c", SLOW_BUILDER, store.folder.uri, str(folder)])
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.part")):
        assert builder.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(open_local_copy, store, Cache(str(folder), PLENTY), "train")
        time.sleep(0.3)
        assert not waiting.done() and len(list(folder.glob("*.part"))) == 1
        builder.send_signal(signal.SIGKILL)
        builder.wait()
        reader = waiting.result(timeout=30)
    assert not list(folder.glob("*.part"))
    ids = store.select(["train"]).ids
    assert reader.read(ids) == [images[i] for i in ids]


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_those_used_longest_ago_make_room(tmp_path: Path) -> None:
    stores = [small_store(tmp_path / str(i), classes=4 + i)[0] for i in range(4)]
    assert len({s.fingerprint for s in stores}) == 4
    folder = tmp_path / "cache"
    for s in stores[:3]:
        path = open_local_copy(s, Cache(str(folder), PLENTY), "train").path
        os.utime(path, (1000 + int(s.manifest["splits"]["train"]["classes"]),) * 2)
    reader = open_local_copy(stores[0], Cache(str(folder), PLENTY), "train")  # used now
    reader.file.close()
    held = sum(p.stat().st_size for p in copies(folder))
    room = held + split_bytes(stores[3], "train") - 1  # one byte short: one has to go
    open_local_copy(stores[3], Cache(str(folder), room), "train")
    left = [p.name for p in copies(folder)]
    assert [any(s.fingerprint in name for name in left) for s in stores] == [True, False, True, True]


def test_one_in_use_stays(tmp_path: Path) -> None:
    (first, images), (second, others) = small_store(tmp_path / "a"), small_store(tmp_path / "b", classes=5)
    folder = tmp_path / "cache"
    reader = open_local_copy(first, Cache(str(folder), PLENTY), "train")
    cache = Cache(str(folder), reader.path.stat().st_size + split_bytes(second, "train") - 1)  # one byte short
    with pytest.raises(CacheFull, match="copies in use take"):
        open_local_copy(second, cache, "train")
    with pytest.warns(UserWarning, match=r"read from the store, which is slower.*raise cache.max_bytes"):
        slow = open_reader(second.folder.uri, second.fingerprint, cache)
    ids, other_ids = first.select(["train"]).ids, second.select(["train"]).ids
    assert isinstance(slow, RowGroupReader) and slow.read(other_ids) == [others[i] for i in other_ids]
    assert reader.read(ids) == [images[i] for i in ids]
    reader.file.close()
    assert open_local_copy(second, cache, "train").read(other_ids) == [others[i] for i in other_ids]
    assert [second.fingerprint in p.name for p in copies(folder)] == [True]


def test_one_that_is_removed_while_it_is_opened_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking for the file and opening it, another process may have made room."""
    store, images = small_store(tmp_path)
    cache = Cache(str(tmp_path / "cache"), PLENTY)
    path = open_local_copy(store, cache, "train").path
    original, times = cache_module._open_shared, 0

    def hold(path: Path) -> object:
        nonlocal times
        times += 1
        if times == 1:
            path.unlink()
        return original(path)

    monkeypatch.setattr(cache_module, "_open_shared", hold)
    ids = store.select(["train"]).ids
    assert open_local_copy(store, cache, "train").read(ids) == [images[i] for i in ids]
    assert times == 2 and path.exists()


def test_a_split_larger_than_allowed_is_read_from_the_store(make_config: Callable[..., Config], store: Store) -> None:
    size = split_bytes(store, "train")
    assert size == sum(s["bytes"] for s in store.manifest["shards"] if "train" in s["file"])
    config = make_config({"cache.max_bytes": size})
    assert image_source(config, store).cache == Cache(str(config.cache.folder), size)
    assert image_source(make_config({"cache.max_bytes": size - 1}), store).cache is None
    found = image_source(make_config({"cache.folder": None}), store).cache
    assert found is not None and found.folder == f"{config.root}/cache"
    found = image_source(make_config({"cache.folder": None, "storage": "s3://b/x"}), store).cache
    assert found is not None and found.folder == os.path.expanduser("~/raydml/cache")


@pytest.mark.parametrize("name", ["a/b", "../x", "a b:c"])
def test_a_name_stays_within_the_folder(name: str, store: Store, tmp_path: Path) -> None:
    named = copy.copy(store)
    named.name = name
    open_local_copy(named, Cache(str(tmp_path / "cache"), PLENTY), "train")
    assert [path.parent for path in tmp_path.rglob("*.arrow")] == [tmp_path / "cache"]


def test_a_full_disk_is_told(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(RunError, match=r"cache has 0 MiB free, the copy of train needs 0: set cache.folder"):
        open_local_copy(store, Cache(str(tmp_path / "cache"), PLENTY), "train")


def test_a_folder_that_cannot_be_made_is_told(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"copy of train cannot be made in .*: set cache\.folder") as caught:
        open_local_copy(store, Cache(str(tmp_path / "file" / "cache"), PLENTY), "train")
    assert "\n" not in str(caught.value)


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_shard_is_named_and_no_copy_is_left(copy: Store, tmp_path: Path) -> None:
    good = copy.folder.read(copy.manifest["shards"][1]["file"])
    file, _ = flip_image_byte(copy, 1)
    cache = Cache(str(tmp_path / "cache"), PLENTY)
    for _ in range(2):
        with pytest.raises(RunError, match=f"shard .*{file} is damaged"):
            open_reader(copy.folder.uri, copy.fingerprint, cache)
        assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]
    copy.folder.write(file, good)  # copied again
    assert isinstance(open_reader(copy.folder.uri, copy.fingerprint, cache), MappedReader)


def test_a_truncated_copy_is_named(store: Store, tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), PLENTY)
    path = open_local_copy(store, cache, "train").path
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match=rf"{path.name} is damaged.*remove it"):
        open_reader(store.folder.uri, store.fingerprint, cache)


def test_a_file_with_other_columns_is_named(store: Store, tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), PLENTY)
    path = open_local_copy(store, cache, "train").path
    table = pa.table({"sample_id": [1], "image": [b""]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(RunError, match=r"is damaged \(it has the columns \['sample_id', 'image'\]\): remove it"):
        open_local_copy(store, cache, "train")


def test_a_changed_byte_is_named(tmp_path: Path) -> None:
    store, images = small_store(tmp_path)
    cache = Cache(str(tmp_path / "cache"), PLENTY)
    path = open_local_copy(store, cache, "train").path
    ids = store.select(["train"]).ids
    data = bytearray(path.read_bytes())
    data[data.index(images[int(ids[5])]) + 20] ^= 1
    path.write_bytes(bytes(data))
    reader = open_local_copy(Store(Folder(store.folder.uri)), cache, "train")
    assert reader.read(ids[:5]) == [images[i] for i in ids[:5]]
    with pytest.raises(
        RunError, match=rf"{path.name} is damaged \(sample {ids[5]} does not match its checksum\): remove it"
    ):
        reader.read(ids[3:7])
