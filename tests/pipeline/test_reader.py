"""Encoded images by id: two readers give the same bytes, the cache is made once, damage is named."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import Config
from pipeline.data import reader
from pipeline.data.catalog import Entry
from pipeline.data.reader import MappedReader, RowGroupReader, cache_file, fits_cache, make_cache, open_reader
from pipeline.data.store import Store, write_store
from pipeline.errors import RunError
from pipeline.prepare import run_here
from pipeline.storage import Folder
from pipeline.worker import pixel_source
from tests.conftest import write_images
from tests.pool import Pool


@pytest.fixture(autouse=True)
def fresh_readers() -> Iterator[None]:
    """Readers are kept for the life of a process."""
    open_reader.cache_clear()
    yield
    open_reader.cache_clear()


@pytest.fixture(scope="module")
def images(store: Store) -> dict[int, bytes]:
    return bytes_of(store)


@pytest.fixture
def copy(store: Store, tmp_path: Path) -> Store:
    shutil.copytree(store.folder.path(), tmp_path / "copy")
    return Store(Folder(tmp_path / "copy"))


def bytes_of(store: Store) -> dict[int, bytes]:
    tables = [store.shard_table(shard) for shard in store.manifest["shards"]]
    return {row["sample_id"]: row["image"] for table in tables for row in table.to_pylist()}


def small_store(root: Path, classes: int = 4, reject: Set[int] = frozenset()) -> tuple[Store, dict[int, bytes]]:
    """4 images a class and shard, all training; some cannot be read."""
    found = write_images(root / "images", {f"{c:02d}": 4 for c in range(classes)}, seed=0, side=8)
    for i in reject:
        Path(found[i][0]).write_bytes(b"?")
    entries = [Entry(path, name, "train") for path, name in found]
    store = write_store(
        "x", entries, Folder(root / "store"), run_here, num_folds=2, images_per_shard=4, max_rejected=1.0
    )
    return store, bytes_of(store)


def flip_image_byte(store: Store, shard: int) -> tuple[str, int]:
    """Changes one byte inside the pixels of a shard's last image; returns the file and the sample."""
    record = store.manifest["shards"][shard]
    row = store.shard_table(record).to_pylist()[-1]
    data = bytearray(store.folder.read(record["file"]))
    data[data.index(row["image"]) + len(row["image"]) // 2] ^= 1
    store.folder.write(record["file"], bytes(data))
    return record["file"], row["sample_id"]


def test_both_readers_give_the_bytes_that_were_written(store: Store, images: dict[int, bytes], tmp_path: Path) -> None:
    training = store.select(["train"]).ids
    cached = open_reader(store.folder.uri, store.fingerprint, str(tmp_path / "cache"))
    direct = open_reader(store.folder.uri, store.fingerprint, None)
    assert isinstance(cached, MappedReader) and isinstance(direct, RowGroupReader)
    random = np.random.default_rng(0)
    for ids in (training, training[::-1].copy(), random.choice(training, 200), training[:1], training[:0]):
        assert cached.read(ids) == direct.read(ids) == [images[i] for i in ids]
    everything = random.permutation(store.sample_id)
    assert direct.read(everything) == [images[i] for i in everything], "test images too"


def test_ids_with_gaps(store: Store, tmp_path: Path) -> None:
    """Rejected images leave gaps between ids, so an id is not a row."""
    opened, expected = small_store(tmp_path, reject={1, 2, 11})
    ids = opened.select(["train"]).ids
    assert (np.diff(ids) > 1).any()
    for kind in (MappedReader(make_cache(opened, str(tmp_path / "cache"), "train")), RowGroupReader(opened)):
        assert kind.read(ids) == [expected[i] for i in ids]


def test_a_reader_is_opened_once_and_knows_its_store(copy: Store) -> None:
    first = open_reader(copy.folder.uri, copy.fingerprint, None)
    assert open_reader(copy.folder.uri, copy.fingerprint, None) is first
    with pytest.raises(RunError, match=f"changed while it was in use: fingerprint {copy.fingerprint}, expected other"):
        open_reader(copy.folder.uri, "other", None)


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_is_made_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = str(tmp_path / "deep" / "cache")
    path = make_cache(store, cache, "train")
    assert path == cache_file(store, cache, "train") and store.fingerprint in path.name
    made = path.stat()
    monkeypatch.setattr(Store, "shard_table", lambda *_: pytest.fail("read again"))
    assert make_cache(store, cache, "train") == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (made.st_mtime_ns, made.st_ino)
    assert not list(path.parent.glob("*.part"))


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
        return make_cache(store, str(tmp_path / "cache"), "train")

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(make, range(6)))) == 1
    assert sorted(reads) == sorted(s["file"] for s in store.manifest["shards"] if "train" in s["file"]), (
        "each shard once"
    )


def read_in_process(
    rank: int, world: int, uri: str, fingerprint: str, cache: str, ids: np.ndarray
) -> tuple[int, list[bytes]]:
    data = open_reader(uri, fingerprint, cache).read(ids)
    (path,) = Path(cache).glob("*.arrow")
    return path.stat().st_ino, data


@pytest.mark.cluster
def test_processes_that_start_together_share_one(
    pool: Pool, store: Store, images: dict[int, bytes], tmp_path: Path
) -> None:
    ids = store.select(["train"]).ids
    results = pool(read_in_process, 3, store.folder.uri, store.fingerprint, str(tmp_path / "cache"), ids)
    assert len({inode for inode, _ in results}) == 1
    assert all(data == [images[i] for i in ids] for _, data in results)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_split_larger_than_allowed_is_read_from_the_store(make_config: Callable[..., Config], store: Store) -> None:
    size = sum(s["bytes"] for s in store.manifest["shards"] if "train" in s["file"])
    assert fits_cache(store, "train", size) and not fits_cache(store, "train", size - 1)
    config = make_config({"runtime.cache_bytes": size})
    assert pixel_source(config, store).cached == config.runtime.cache
    assert pixel_source(make_config({"runtime.cache_bytes": size - 1}), store).cached is None
    assert pixel_source(make_config({"runtime.cache": None}), store).cached == f"{config.root}/cache"
    home = os.path.expanduser("~/raydml/cache")
    assert pixel_source(make_config({"runtime.cache": None, "storage": "s3://b/x"}), store).cached == home


def test_a_full_disk_is_told(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(RunError, match=r"cache has 0 MiB free, the copy of train needs 0: set runtime.cache"):
        make_cache(store, str(tmp_path / "cache"), "train")


def test_a_cache_folder_that_cannot_be_made_is_told(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"copy of train cannot be made in .*: set runtime\.cache") as caught:
        make_cache(store, str(tmp_path / "file" / "cache"), "train")
    assert "\n" not in str(caught.value)


def test_a_damaged_copy_is_named(store: Store, tmp_path: Path) -> None:
    path = make_cache(store, str(tmp_path), "train")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match=rf"{path.name} is damaged.*remove it"):
        open_reader(store.folder.uri, store.fingerprint, str(tmp_path))


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_shard_is_named_and_no_copy_is_left(copy: Store, tmp_path: Path) -> None:
    good = copy.folder.read(copy.manifest["shards"][1]["file"])
    file, _ = flip_image_byte(copy, 1)
    for _ in range(2):
        with pytest.raises(RunError, match=f"shard .*{file} is damaged"):
            open_reader(copy.folder.uri, copy.fingerprint, str(tmp_path / "cache"))
        assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]
    copy.folder.write(file, good)  # copied again
    open_reader(copy.folder.uri, copy.fingerprint, str(tmp_path / "cache"))


def test_a_damaged_page_is_named(copy: Store) -> None:
    file, bad = flip_image_byte(copy, 1)
    direct = RowGroupReader(copy)
    with pytest.raises(RunError, match=f"shard .*{file} cannot be read.*copy or prepare it again") as caught:
        direct.read(np.array([bad]))
    assert "\n" not in str(caught.value)
    other = copy.sample_id[copy.sample_id < bad - 20]
    assert len(direct.read(other)) == len(other), "the other shards can be read"


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_a_shard_without_its_end_is_named(damage: str, copy: Store) -> None:
    file = copy.manifest["shards"][0]["file"]
    data = copy.folder.read(file)
    copy.folder.remove(file)
    if damage != "missing":
        copy.folder.write(file, data[: len(data) // 2] if damage == "truncated" else b"")
    with pytest.raises(RunError, match=f"shard .*{file} cannot be read") as caught:
        RowGroupReader(copy).read(copy.sample_id[:1])
    assert "\n" not in str(caught.value)


def test_row_groups_in_object_storage(store: Store, images: dict[int, bytes], bucket: str) -> None:
    remote = Folder(bucket) / "data" / "tiny"
    for name in ("manifest.json", "catalog.parquet", *(s["file"] for s in store.manifest["shards"])):
        remote.write(name, store.folder.read(name))
    ids = np.random.default_rng(0).permutation(store.sample_id)
    assert open_reader(remote.uri, store.fingerprint, None).read(ids) == [images[i] for i in ids]


def test_row_groups_may_be_read_by_several_threads(tmp_path: Path) -> None:
    """Training prefetches in one thread while an evaluation reads in another; both share the reader."""
    opened, expected = small_store(tmp_path, classes=15)  # 15 row groups, of which 8 are kept
    direct = RowGroupReader(opened)

    def read(seed: int) -> bool:
        random = np.random.default_rng(seed)
        return all(
            direct.read(ids) == [expected[i] for i in ids]
            for ids in (random.choice(opened.sample_id, 8) for _ in range(40))
        )

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(6)))
