"""Encoded images by id: two readers give the same bytes, row groups are read ahead, damage is named."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import reader as reader_module
from pipeline.data.cache import Cache, MappedReader, open_local_copy
from pipeline.data.entries import Entry
from pipeline.data.reader import RowGroupReader, open_reader
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.errors import RunError
from pipeline.storage import Folder
from pipeline.testing.tiny import write_images

pytestmark = pytest.mark.usefixtures("fresh_readers")


@pytest.fixture(scope="module")
def images(store: Store) -> dict[int, bytes]:
    return bytes_of(store)


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
        "x", entries, Folder(root / "store"), run_serially, num_folds=2, images_per_shard=4, max_rejected=1.0
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
    cached = open_reader(store.folder.uri, store.fingerprint, Cache(str(tmp_path / "cache"), 2**30))
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
    for kind in (open_local_copy(opened, Cache(str(tmp_path / "cache"), 2**30), "train"), RowGroupReader(opened)):
        assert kind.read(ids) == [expected[i] for i in ids]


@pytest.mark.parametrize("said", [True, False])
def test_row_groups_of_any_size(tmp_path: Path, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest says how many images they hold; earlier ones did not, and it was 64."""
    monkeypatch.setattr("pipeline.data.write_store.ROW_GROUP", 5 if said else 64)
    found = write_images(tmp_path / "images", {"a": 75, "b": 4}, seed=0, side=8)
    entries = [Entry(path, name, "train") for path, name in found]
    made = write_store("x", entries, Folder(tmp_path / "store"), run_serially, num_folds=2)
    if not said:
        made.folder.write_json("manifest.json", {k: v for k, v in made.manifest.items() if k != "row_group"})
    monkeypatch.undo()
    opened = Store(Folder(made.folder.uri))
    ids = np.random.default_rng(0).permutation(opened.sample_id)
    expected = bytes_of(opened)
    assert RowGroupReader(opened).read(ids) == [expected[i] for i in ids]


def test_a_reader_is_opened_once_and_knows_its_store(copy: Store) -> None:
    first = open_reader(copy.folder.uri, copy.fingerprint, None)
    assert open_reader(copy.folder.uri, copy.fingerprint, None) is first
    with pytest.raises(RunError, match=f"changed while it was in use: fingerprint {copy.fingerprint}, expected other"):
        open_reader(copy.folder.uri, "other", None)


# ---- damage ----------------------------------------------------------------------------------------------------------


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
    opened, expected = small_store(tmp_path, classes=15)
    direct = RowGroupReader(opened, buffer_bytes=5 * 2000)  # 15 row groups, of which some are kept

    def read(seed: int) -> bool:
        random = np.random.default_rng(seed)
        draws = [random.choice(opened.sample_id, 8) for _ in range(41)]
        for ids, following in itertools.pairwise(draws):
            direct.prefetch(following)
            if direct.read(ids) != [expected[i] for i in ids]:
                return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(6)))


def test_row_groups_are_read_ahead_several_at_once_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, expected = small_store(tmp_path, classes=12)
    direct = RowGroupReader(opened)
    direct.buffer_bytes = sum(direct.weights[:6])
    began, release = [], threading.Event()
    original = RowGroupReader._read_group

    def read_group(self: RowGroupReader, shard: int, group: int) -> object:
        began.append(shard)
        assert release.wait(30)
        return original(self, shard, group)

    monkeypatch.setattr(RowGroupReader, "_read_group", read_group)
    direct.prefetch(opened.sample_id[8:24])  # the third to the sixth class
    while len(began) < 4:
        time.sleep(0.001)
    release.set()
    assert sorted(began) == [2, 3, 4, 5], "without waiting for one another"
    assert direct.read(opened.sample_id[8:24]) == [expected[i] for i in opened.sample_id[8:24]]
    assert len(began) == 4, "what was read ahead is not read again"
    direct.read(opened.sample_id[:20])
    assert len(began) == 6 and len(direct.groups) == 6
    direct.read(opened.sample_id[24:32])
    assert len(direct.groups) <= 6, "no more is kept than allowed"
    direct.read(opened.sample_id)
    assert {shard for shard, _ in direct.groups} == set(range(12)), "but for what is asked for at once"


def test_footers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those used last; what was let go of is read again."""
    store, _ = small_store(tmp_path)
    assert len(store.manifest["shards"]) > 2
    monkeypatch.setattr(reader_module, "_MAX_FOOTERS", 2)
    reader, expected = RowGroupReader(store), RowGroupReader(store).read(store.sample_id)
    for _ in range(2):
        assert [reader.read(np.array([i]))[0] for i in store.sample_id] == expected
        assert len(reader.metadata) == 2 and list(reader.metadata)[-1] == len(store.manifest["shards"]) - 1
        reader.clear()
        assert not reader.groups


def test_a_failed_read_is_tried_again(tmp_path: Path) -> None:
    opened, expected = small_store(tmp_path)
    file = opened.manifest["shards"][1]["file"]
    data, direct = opened.folder.read(file), RowGroupReader(opened)
    opened.folder.remove(file)
    direct.prefetch(opened.sample_id)  # nobody is told
    with pytest.raises(RunError, match=f"{file} cannot be read"):
        direct.read(opened.sample_id)
    opened.folder.write(file, data)
    assert direct.read(opened.sample_id) == [expected[i] for i in opened.sample_id]
