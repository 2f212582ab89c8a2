"""A node's copy of decoded pixels: the same pixels as from encoded images, a size known beforehand, the bounds of other copies."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import train
from pipeline.config import Config
from pipeline.data import decoded as decoded_module
from pipeline.data.cache import Cache, open_local_copy, split_bytes
from pipeline.data.decoded import DecodedReader, decoded_bytes, open_decoded_copy, training_copy
from pipeline.data.entries import Entry
from pipeline.data.image_files import decode
from pipeline.data.loader import ImageSource, LoadRequest, fetch
from pipeline.data.reader import RowGroupReader, open_images
from pipeline.data.store import Store
from pipeline.data.transforms import TransformConfig
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.errors import RunError, UserError
from pipeline.storage import Folder
from pipeline.training.dataset_notes import dataset_notes
from pipeline.training.parts import image_source
from tests.pipeline.conftest import Base, contents
from tests.pipeline.data.test_reader import bytes_of

pytestmark = pytest.mark.usefixtures("fresh_readers")
PLENTY = 2**30
SIZES = [(40, 60), (61, 35), (8, 8), (300, 17), (33, 33), (50, 70)]  # width, height


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """JPEGs, grey JPEGs and PNGs of several sizes, in several shards."""
    root = tmp_path_factory.mktemp("mixed")
    entries, random = [], np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES * 2):
        pixels = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
        image = Image.fromarray(pixels).convert("L" if i % 3 == 1 else "RGB")
        path = root / f"{i}.{'png' if i % 3 == 2 else 'jpg'}"
        image.save(path)
        entries.append(Entry(str(path), f"class{i // 3}", "train"))
    return write_store("mixed", entries, Folder(root / "store"), run_serially, num_folds=2, images_per_shard=5)


def without_pixels(store: Store) -> Store:
    """The store as an earlier version wrote it."""
    shards = [{k: v for k, v in shard.items() if k != "pixels"} for shard in store.manifest["shards"]]
    store.folder.write_json("manifest.json", store.manifest | {"shards": shards})
    return Store(store.folder)


@pytest.mark.parametrize("batch_bytes", [1, 10_000, 2**26])
def test_it_gives_what_decoding_gives(
    mixed: Store, tmp_path: Path, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded_module, "_BATCH_BYTES", batch_bytes)
    reader = open_decoded_copy(mixed, Cache(str(tmp_path), PLENTY), "train")
    assert len(reader.batches) == {1: len(SIZES) * 2, 2**26: 1}.get(batch_bytes, len(reader.batches))
    ids = np.random.default_rng(0).choice(mixed.select(["train"]).ids, 30)
    encoded = bytes_of(mixed)
    for sample_id, image in zip(ids.tolist(), reader.images(ids), strict=True):
        expected = decode(encoded[sample_id])
        assert torch.equal(image, expected) and image.stride() == expected.stride()
        image.zero_()  # its memory is its own
    assert all(
        torch.equal(image, decode(encoded[i])) for i, image in zip(ids.tolist(), reader.images(ids), strict=True)
    )


def test_pixels_of_steps_and_of_evaluation_are_the_same(mixed: Store, tmp_path: Path) -> None:
    ids = mixed.select(["train"]).ids
    transforms = TransformConfig(size=24, jitter=0.3, rotate=10, pad=0.1)
    sources = [
        ImageSource(mixed.folder.uri, mixed.fingerprint, Cache(str(tmp_path), PLENTY, kept), transforms, seed=3)
        for kept in (True, False)
    ]
    for request in (LoadRequest(ids, (2, 9, 4)), LoadRequest(ids)):
        np.testing.assert_array_equal(*(fetch(source, request) for source in sources))
    assert isinstance(open_images(*_place(mixed), sources[0].cache), DecodedReader)
    assert len(list(tmp_path.glob("*.arrow"))) == 2, "one of each kind"


def _place(store: Store) -> tuple[str, str]:
    return store.folder.uri, store.fingerprint


def test_a_run_comes_to_the_same_weights(base: Base, tmp_path: Path) -> None:
    before = base.files()
    runs = {f"{tmp_path}/runs/done": True, base.run.uri: False}
    changes = {"storage": str(tmp_path), "cache.decoded": True, "cache.folder": str(tmp_path / "cache")}
    assert train.main([base.recipe(changes)]) == 0
    assert [path.name for path in (tmp_path / "cache").glob("*.arrow")] == [training_copy(base.store, PLENTY, True)[0]]
    kept, other = (
        {name: data for name, data in contents(Path(uri)).items() if name.endswith(".safetensors")} for uri in runs
    )
    assert kept == other and kept
    assert base.files() == before


def test_its_size_is_known_beforehand(mixed: Store, tmp_path: Path) -> None:
    size = decoded_bytes(mixed, "train")
    assert size == 2 * 3 * sum(width * height for width, height in SIZES)
    path = open_decoded_copy(mixed, Cache(str(tmp_path), PLENTY), "train").path
    assert size <= path.stat().st_size <= size + 10_000


def test_pixels_that_are_too_large_stay_encoded(
    make_config: Callable[..., Config], mixed: Store, tmp_path: Path
) -> None:
    size = decoded_bytes(mixed, "train")
    assert size is not None

    def noted(max_bytes: int, store: Store = mixed) -> tuple[Cache | None, list[str]]:
        config = make_config({"cache.decoded": True, "cache.max_bytes": max_bytes})
        lines = [
            line for line in dataset_notes(config, store, store.select(["train"])) if line.startswith("cache.decoded")
        ]
        return image_source(config, store).cache, lines

    cache, lines = noted(size)
    assert cache is not None and cache.decoded
    assert lines == [f"cache.decoded: each node keeps {size / 1e9:.2g} GB of decoded pixels in its cache folder"]
    cache, (line,) = noted(size - 1)
    assert cache is None or not cache.decoded
    assert "cache.decoded has no effect: the decoded training split takes 0.0 GB, cache.max_bytes allows 0.0" in line
    copy = Folder(tmp_path / "copy")
    for name, data in contents(Path(mixed.folder.path())).items():
        copy.write(name, data)
    cache, (line,) = noted(PLENTY, without_pixels(Store(copy)))
    assert cache is not None and not cache.decoded and "prepared by an earlier version" in line
    assert training_copy(Store(copy), PLENTY, True)[1] == split_bytes(mixed, "train")


def test_without_room_encoded_images_are_read(mixed: Store, store: Store, tmp_path: Path) -> None:
    held = open_local_copy(store, Cache(str(tmp_path), PLENTY), "train")
    room = held.path.stat().st_size
    cache = Cache(str(tmp_path), room + (decoded_bytes(mixed, "train") or 0) - 1, decoded=True)  # one byte short
    with pytest.warns(
        UserWarning, match=r"images are decoded in every step, which is slower: .*; raise cache.max_bytes"
    ):
        reader = open_images(*_place(mixed), cache)
    assert not isinstance(reader, DecodedReader | RowGroupReader), "the copy of encoded images has room"
    held.file.close()


def test_a_changed_byte_is_named(mixed: Store, tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), PLENTY)
    reader = open_decoded_copy(mixed, cache, "train")
    ids = mixed.select(["train"]).ids
    pixels = next(reader.images(ids[5:6])).permute(1, 2, 0).numpy().tobytes()
    data = bytearray(reader.path.read_bytes())
    data[data.index(pixels) + 20] ^= 1
    reader.path.write_bytes(bytes(data))
    reader = open_decoded_copy(mixed, cache, "train")
    assert len(list(reader.images(ids[:5]))) == 5
    with pytest.raises(RunError, match=rf"is damaged \(sample {ids[5]} does not match its checksum\): remove it"):
        list(reader.images(ids[3:7]))


def test_it_cannot_be_combined_with_smaller_decoding(make_config: Callable[..., Config]) -> None:
    with pytest.raises(
        UserError, match=r"cache.decoded keeps whole images, data.transforms.decode_at_least decodes smaller"
    ):
        make_config({"cache.decoded": True, "data.transforms.decode_at_least": 500})


# ---- JPEGs decoded at a part of their size ---------------------------------------------------------------------------


def smooth_jpeg(width: int, height: int, mode: str = "RGB") -> bytes:
    random = np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(random).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(
        out, "JPEG", quality=95
    )
    return out.getvalue()


@pytest.mark.parametrize(
    ("size", "least", "expected"),
    [
        ((640, 480), None, (640, 480)),
        ((640, 480), 241, (640, 480)),
        ((640, 480), 240, (320, 240)),
        ((640, 480), 121, (320, 240)),
        ((640, 480), 120, (160, 120)),
        ((480, 641), 60, (60, 81)),  # rounded up
        ((640, 480), 8, (80, 60)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_shorter_side_keeps_as_many_pixels(
    size: tuple[int, int], least: int | None, expected: tuple[int, int], mode: str
) -> None:
    data = smooth_jpeg(*size, mode)
    image = decode(data, least)
    assert tuple(image.shape) == (3, expected[1], expected[0]) and image.dtype == torch.uint8
    whole = torch.nn.functional.interpolate(decode(data)[None].float(), image.shape[1:], mode="area")[0]
    assert (image.float() - whole).abs().mean() < 4, "the same picture, of fewer pixels"


def test_only_large_jpegs_of_training_are_decoded_smaller(tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(smooth_jpeg(640, 480))
    (tmp_path / "small.jpg").write_bytes(smooth_jpeg(60, 60))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3)).astype(np.uint8)).save(tmp_path / "x.png")
    entries = [Entry(str(tmp_path / name), name, "train") for name in ("large.jpg", "small.jpg", "x.png")]
    store = write_store("x", entries, Folder(tmp_path / "store"), run_serially, num_folds=2)
    whole, reduced = (
        ImageSource(*_place(store), None, TransformConfig(size=32, decode_at_least=least)) for least in (None, 48)
    )
    ids = store.select(["train"]).ids
    np.testing.assert_array_equal(fetch(whole, LoadRequest(ids)), fetch(reduced, LoadRequest(ids)))
    a, b = (fetch(source, LoadRequest(ids, (0, 0, 0))).astype(int) for source in (whole, reduced))
    differs = (a != b).any((1, 2, 3))
    assert differs.tolist() == [True, False, False] and np.abs(a - b)[0].mean() < 4


def test_a_side_smaller_than_the_network_sees_is_refused() -> None:
    with pytest.raises(ValueError, match="decode_at_least is 100, smaller than size 224"):
        TransformConfig(decode_at_least=100)
