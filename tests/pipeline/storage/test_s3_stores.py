"""Datasets in object storage with faults: prepared, read in part, and copied once to a node's own disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data import own_images
from pipeline.data.cache import Cache
from pipeline.data.loader import ImageSource, LoadRequest, load
from pipeline.data.reader import RowGroupReader, open_reader
from pipeline.data.store import Store
from pipeline.data.transforms import TransformConfig
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.errors import RunError
from pipeline.storage import Folder, s3
from pipeline.testing.tiny import write_images
from tests.pipeline.conftest import Base
from tests.pipeline.storage.conftest import copy_store
from tests.s3 import Proxy

pytestmark = pytest.mark.usefixtures("fresh_readers")


def test_row_groups(base: Base, place: Folder, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(copy_store(base.store, place))
    everything = np.random.default_rng(0).permutation(store.sample_id)
    expected = RowGroupReader(base.store).read(everything)
    for kind, first in (("cut", 1), ("short", 3), ("answer", 5), ("reset", 7)):
        proxy.inject(kind, "GET", "shards/", first=first)
    assert RowGroupReader(store).read(everything) == expected
    assert all(fault.hit.is_set() for fault in proxy.faults)
    proxy.reset()
    monkeypatch.setenv(s3.RETRY_TIMEOUT, "0.4")
    shard = store.manifest["shards"][0]["file"]
    proxy.inject("short", "GET", shard, first=1, count=1000)  # the first read is of the footer
    with pytest.raises(
        RunError, match=rf"^{place}/{shard}: get_object failed, .* with IncompleteBody: got \d+ of \d+ bytes"
    ):
        RowGroupReader(Store(Folder(place.uri))).read(store.sample_id[:1])


def test_prepare(place: Folder, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From images in object storage: the store that prepare makes on a local disk, or none."""
    for path, name in write_images(tmp_path / "images", {f"c{i}": 3 for i in range(6)}, seed=0, side=8):
        (place / "images").write(f"{name}/{Path(path).name}", Path(path).read_bytes())

    def prepare(images: str, target: Folder) -> Store:
        return write_store(
            "x", own_images.folder(images).entries, target, run_serially, num_folds=2, images_per_shard=4
        )

    expected = prepare(str(tmp_path / "images"), Folder(tmp_path / "store"))
    for kind, method, key in (
        ("answer", "GET", "prefix=.*images"), ("cut", "GET", "c1/0.png"), ("damaged", "GET", "c3/2.png"),
        ("reset", "PUT", "shards/"), ("upload cut", "PUT", "train-00001"), ("lost", "PUT", "manifest.json"),
    ):  # fmt: skip
        proxy.inject(kind, method, key)
    made = prepare((place / "images").uri, place / "store")
    assert all(fault.hit.is_set() for fault in proxy.faults)
    assert made.fingerprint == expected.fingerprint  # the paths of the images are not a part of it, but of the files
    one, other = ({k: v for k, v in s.manifest.items() if k not in ("shards", "catalog")} for s in (made, expected))
    assert one == other
    for mine, theirs in zip(made.manifest["shards"], expected.manifest["shards"], strict=True):
        tables = made.shard_table(mine), expected.shard_table(theirs)
        assert tables[0].drop_columns(["source"]).equals(tables[1].drop_columns(["source"]))

    monkeypatch.setenv(s3.RETRY_TIMEOUT, "0.4")
    for method, key in (("PUT", "shards/train-00001"), ("GET", "c1/0.png")):  # an image is not rejected for it
        proxy.reset()
        proxy.inject("upload cut" if method == "PUT" else "cut", method, key, count=1000)
        with pytest.raises(RunError, match=f"^{place}/.*{key}.*: {method.lower()}_object failed, "):
            prepare((place / "images").uri, Folder(place.uri) / "store")
        proxy.reset()
        assert (
            Store(place / "store").fingerprint == expected.fingerprint
        )  # the earlier one stays until the new one is whole
    proxy.reset()
    assert prepare((place / "images").uri, place / "store").fingerprint == expected.fingerprint


def test_training_from_a_warm_cache_asks_for_nothing(
    base: Base, place: Folder, proxy: Proxy, tmp_path: Path, fresh_readers: None
) -> None:
    """The first reader copies every training shard once; a later process opens the dataset, and then only its own disk."""
    store = Store(copy_store(base.store, place))
    shards = [s["file"] for s in store.manifest["shards"] if s["file"].startswith("shards/train-")]
    source = ImageSource(place.uri, store.fingerprint, Cache(str(tmp_path), 2**30), TransformConfig(size=16))
    items = [
        LoadRequest(np.asarray(ids), (0, step, 0))
        for step, ids in enumerate(store.select(["train"]).ids.reshape(-1, 2)[:20])
    ]
    seen = []
    for _ in range(2):
        proxy.reset()
        open_reader.cache_clear()
        pixels = load(source, items, "in_process")
        batches = [next(pixels).numpy()]
        before = len(proxy.requests)
        batches += [batch.numpy() for batch in pixels]
        assert len(proxy.requests) == before and len(batches) == 20
        seen.append((batches, [proxy.count("GET", f"/{name}$") for name in shards]))
    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    assert [counts for _, counts in seen] == [[1] * len(shards), [0] * len(shards)]
