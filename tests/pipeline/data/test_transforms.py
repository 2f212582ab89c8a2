"""Pixels for training and evaluation, and their way through the loader that runs in this process."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from pipeline.data import loader
from pipeline.data.image_files import decode
from pipeline.data.loader import PREFETCH, ImageSource, LoadRequest, fetch, load
from pipeline.data.reader import open_reader
from pipeline.data.store import Store
from pipeline.data.transforms import TransformConfig, evaluation_pixels, training_pixels
from pipeline.errors import RunError

STILL = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}  # training without any randomness


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth random colours."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8))
    return torch.from_numpy(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).copy()).permute(2, 0, 1)


def noise(height: int, width: int) -> torch.Tensor:
    """Full of detail, so that reducing it without a filter shows."""
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def train(image: torch.Tensor, seed: int = 0, **values: object) -> torch.Tensor:
    config = TransformConfig(**{"size": 32, **STILL, **values})
    return training_pixels(image, config, np.random.Generator(np.random.PCG64([seed])))


def evaluate(image: torch.Tensor, **values: object) -> torch.Tensor:
    return evaluation_pixels(image, TransformConfig(**{"size": 32, **values}))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().mean())


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (64, 40), (40, 64), (20, 17), (500, 33), (1, 1)])
@pytest.mark.parametrize("values", [{}, {"squash": True}, {"resize": 40}, {"resize": 40, "squash": True}])
def test_evaluation_pixels_are_square_and_deterministic(size: tuple[int, int], values: dict) -> None:
    image = picture(*size)
    got = evaluate(image, **values)
    assert got.shape == (3, 32, 32) and got.dtype == torch.uint8
    torch.manual_seed(5)
    assert torch.equal(got, evaluate(image.clone(), **values))


@pytest.mark.parametrize(("resize", "side"), [(None, 32), (48, 48)])
def test_evaluation_keeps_the_aspect_ratio_and_crops_the_centre(resize: int | None, side: int) -> None:
    image = noise(120, 60)
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, 2 * side), Image.Resampling.BICUBIC)
    left, top = (side - 32) // 2, (2 * side - 32) // 2
    expected = np.asarray(pillow.crop((left, top, left + 32, top + 32)))
    assert np.abs(evaluate(image, resize=resize).permute(1, 2, 0).numpy().astype(int) - expected).max() <= 3


@pytest.mark.parametrize(("resize", "of_evaluation"), [(40, (48, 60)), (None, (48, None))])
def test_evaluation_is_scaled_and_training_is_not(resize: int | None, of_evaluation: tuple[int, int | None]) -> None:
    config = TransformConfig(size=32, resize=resize, evaluation_scale=1.5, **STILL)
    scaled = config.of_evaluation()
    assert (scaled.size, scaled.resize) == of_evaluation and scaled.of_evaluation() is scaled
    image = noise(120, 60)
    assert torch.equal(evaluation_pixels(image, scaled), evaluate(image, size=48, resize=of_evaluation[1]))
    assert train(image, evaluation_scale=1.5).shape == (3, 32, 32)


def test_squash_ignores_the_aspect_ratio() -> None:
    image = noise(120, 60)
    expected = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.abs(evaluate(image, squash=True).permute(1, 2, 0).numpy().astype(int) - expected).max() <= 3
    assert difference(evaluate(image, squash=True), evaluate(image)) > 5


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_without_randomness_is_a_plain_resize() -> None:
    image = picture(64, 64)
    assert torch.equal(train(image), train(image, seed=1))
    assert difference(train(image), evaluate(image)) < 2
    assert torch.equal(train(image, flip=1.0), train(image).flip(-1))


RANDOM = {
    "crop_scale": {"crop_scale": (0.2, 0.9)},
    "crop_ratio": {"crop_scale": (0.5, 0.5), "crop_ratio": (0.5, 2.0)},
    "pad": {"pad": 0.3, "crop_scale": (0.3, 0.6)},
    "rotate": {"rotate": 30.0},
    "flip": {"flip": 0.5},
    "jitter": {"jitter": 0.4},
    "hue": {"hue": 0.3},
    "grey": {"grey": 0.5},
}


@pytest.mark.parametrize("name", RANDOM)
def test_each_option_has_an_effect_that_follows_from_the_key_alone(name: str) -> None:
    image = picture(50, 70)
    drawn = [train(image, seed, **RANDOM[name]) for seed in range(12)]
    assert all(d.shape == (3, 32, 32) and d.dtype == torch.uint8 for d in drawn)
    assert max(difference(d, train(image)) for d in drawn) > 1, "it does something"
    assert len({d.numpy().tobytes() for d in drawn}) >= 2, "it is random"
    torch.manual_seed(9)
    np.random.seed(9)
    for seed in (3, 0):
        assert torch.equal(drawn[seed], train(image.clone(), seed, **RANDOM[name])), "a pure function of the key"


def test_crops_cover_the_configured_share() -> None:
    """An image whose red tells the column and whose green tells the row: the crop's extent can be read off its pixels."""
    ramp = torch.arange(200).float() * 255 / 199
    image = torch.stack([ramp.expand(200, 200), ramp[:, None].expand(200, 200), torch.zeros(200, 200)]).to(torch.uint8)
    shares, centres = [], []
    for seed in range(200):
        out = train(image, seed, crop_scale=(0.25, 0.5)).float()
        width, height = ((out[c].max() - out[c].min()) / 255 * 33 / 32 for c in (0, 1))
        shares.append(float(width * height))
        centres.append(float(out[0].mean()) / 255)
    assert 0.2 < min(shares) < 0.3 and 0.45 < max(shares) < 0.55, "the share of the area"
    wide = train(image, 0, crop_scale=(0.3, 0.3), crop_ratio=(2.0, 2.0)).float()
    width, height = ((wide[c].max() - wide[c].min()) / 255 * 33 / 32 for c in (0, 1))
    assert abs(width / height - 2) < 0.1 and abs(width * height - 0.3) < 0.03, "twice as wide as high"
    assert min(centres) < 0.35 and max(centres) > 0.65 and abs(np.mean(centres) - 0.5) < 0.03, "anywhere, without bias"


def test_padding_and_rotation_fill_with_white() -> None:
    black = torch.zeros(3, 40, 40, dtype=torch.uint8)
    padded = train(black, pad=0.5)
    assert int(padded[:, 0].min()) == 255 and int(padded[:, 16, 16].max()) == 0
    assert 0.7 < float((padded > 127).float().mean()) < 0.8, "40 of 80 pixels remain in each direction"
    turned = [train(black, seed, rotate=45.0) for seed in range(8)]
    assert max(int(t[:, 0, 0].min()) for t in turned) == 255


def test_grey_drops_colour_and_jitter_keeps_structure() -> None:
    image = picture(32, 32)
    grey = train(image, grey=1.0)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])
    jittered = train(image, 3, jitter=0.3)
    assert np.corrcoef(jittered.flatten(), train(image).flatten())[0, 1] > 0.8


@pytest.mark.parametrize("side", [1, 2, 5])
def test_images_smaller_than_the_crop(side: int) -> None:
    for seed in range(20):
        assert train(picture(side, 40), seed, crop_scale=(0.01, 1.0), crop_ratio=(0.3, 3.0)).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": 7}, "greater than or equal to 8"),
        ({"crop_scale": (0, 1)}, "0 < low <= high"),
        ({"crop_scale": (0.9, 0.5)}, "0 < low <= high"),
        ({"crop_scale": (0.5, 1.5)}, "at most 1: use pad"),
        ({"crop_ratio": (2, 1)}, "crop_ratio is"),
        ({"resize": 200}, "resize is 200, smaller than size 224"),
        ({"flip": 1.5}, "less than or equal to 1"),
        ({"jitter": 1.0}, "less than 1"),
        ({"hue": 0.6}, "less than or equal to 0.5"),
        ({"rotate": 181}, "less than or equal to 180"),
        ({"pad": -0.1}, "greater than or equal to 0"),
    ],
)
def test_config_refuses(values: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TransformConfig(**values)


# ---- fetching and loading --------------------------------------------------------------------------------------------

AUGMENTED = TransformConfig(size=24, jitter=0.3, rotate=10)


@pytest.fixture
def source(store: Store) -> Iterator[ImageSource]:
    open_reader.cache_clear()
    yield ImageSource(store.folder.uri, store.fingerprint, None, AUGMENTED, seed=5)
    open_reader.cache_clear()


def items(store: Store) -> list[LoadRequest]:
    ids = store.select(["train"]).ids
    return [LoadRequest(ids[i : i + 4 + i % 2], (0, i, 3 * i)) for i in range(0, 10)] + [
        LoadRequest(ids[:0], (0, 10, 0)),
        LoadRequest(ids[:3]),
    ]


def test_fetch_decodes_and_keys_every_slot(source: ImageSource, store: Store) -> None:
    ids = store.select(["train"]).ids[:5]
    plain, augmented = fetch(source, LoadRequest(ids)), fetch(source, LoadRequest(ids, (2, 9, 4)))
    assert plain.shape == augmented.shape == (5, 3, 24, 24) and plain.dtype == np.uint8
    reader = open_reader(source.uri, source.fingerprint, None)
    for i, data in enumerate(reader.read(ids)):
        image = decode(data)
        np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(data))))
        np.testing.assert_array_equal(plain[i], evaluation_pixels(image, AUGMENTED))
        random = np.random.Generator(np.random.PCG64([5, 2, 9, 4 + i]))  # seed, epoch, step, slot of the whole batch
        np.testing.assert_array_equal(augmented[i], training_pixels(image, AUGMENTED, random))


def test_ranks_fetch_the_same_pixels_as_one_process(source: ImageSource, store: Store) -> None:
    ids = store.select(["train"]).ids[:8]
    whole = fetch(source, LoadRequest(ids, (1, 7, 0)))
    parts = [fetch(source, LoadRequest(ids[a:b], (1, 7, a))) for a, b in ((0, 3), (3, 3), (3, 8))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_an_image_drawn_twice_is_augmented_twice(source: ImageSource, store: Store) -> None:
    twice = fetch(source, LoadRequest(np.repeat(store.select(["train"]).ids[:1], 2), (0, 0, 0)))
    assert (twice[0] != twice[1]).any()
    for other in ((1, 0, 0), (0, 1, 0)):
        assert (fetch(source, LoadRequest(store.select(["train"]).ids[:1], other))[0] != twice[0]).any()


def test_loading_gives_what_fetch_gives_in_order(source: ImageSource, store: Store) -> None:
    wanted = items(store)
    loaded = list(load(source, wanted, "in_process"))
    assert len(loaded) == len(wanted)
    for got, item in zip(loaded, wanted, strict=True):
        np.testing.assert_array_equal(got.numpy(), fetch(source, item))
    assert list(load(source, [], "in_process")) == []
    assert [len(p) for p in load(source, [LoadRequest(np.zeros(0, dtype=np.int64))], "ray")] == [0], (
        "nothing to load needs no Ray"
    )


def test_items_are_taken_when_they_are_needed(source: ImageSource, store: Store) -> None:
    """An epoch of ten million images is not held as items."""
    taken: list[LoadRequest] = []
    endless = ((taken.append(item), item)[1] for item in itertools.cycle(items(store)))
    stream = load(source, endless, "in_process")
    for _ in range(3):
        next(stream)
    stream.close()
    assert len(taken) == 3 + PREFETCH + 1  # its bytes are asked for ahead


def test_a_long_segment_is_served_by_several_pipelines(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[LoadRequest]] = []

    def pipeline(source: ImageSource, items: list[LoadRequest], loader_cpus: int) -> Iterator[torch.Tensor]:
        started.append(items)
        yield from (torch.full((1,), int(item.ids[0])) for item in items)

    monkeypatch.setattr(loader, "_load_ray", pipeline)
    monkeypatch.setattr(loader, "REQUESTS_PER_PIPELINE", 3)
    taken: list[int] = []
    numbered = ((taken.append(i), LoadRequest(np.array([i])))[1] for i in range(8))
    stream = load(source, numbered, "ray")
    assert int(next(stream)) == 0 and taken == [0, 1, 2]
    assert [int(x) for x in stream] == list(range(1, 8))
    assert [len(part) for part in started] == [3, 3, 2]


def loader_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("loader")}


def test_an_error_while_fetching_comes_out_where_it_belongs(
    source: ImageSource, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = items(store)

    def failing(source: ImageSource, item: LoadRequest, following: LoadRequest | None) -> np.ndarray:
        if item is wanted[3]:
            raise RunError("shard x is damaged")
        return fetch(source, item)

    monkeypatch.setattr(loader, "fetch", failing)
    earlier = loader_threads()  # an abandoned stream of another test may still hold one
    stream = load(source, wanted, "in_process")
    assert [len(next(stream)) for _ in range(3)] == [len(i.ids) for i in wanted[:3]]
    with pytest.raises(RunError, match="shard x is damaged"):
        next(stream)
    assert loader_threads() <= earlier


def test_closing_early_stops_the_thread(source: ImageSource, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[LoadRequest] = []
    monkeypatch.setattr(loader, "fetch", lambda s, item, _: (fetched.append(item), fetch(s, item))[1])
    earlier = loader_threads()
    stream = load(source, items(store), "in_process")
    next(stream)
    assert loader_threads() > earlier, "a thread of its own"
    stream.close()
    assert loader_threads() <= earlier
    assert 1 <= len(fetched) <= 1 + PREFETCH, "no more was fetched than the look-ahead"


def test_the_whole_image_where_nothing_is_cropped() -> None:
    image = picture(40, 90)
    whole = train(image, crop_ratio=(0.5, 2.0))
    assert torch.equal(whole, train(image, seed=5, crop_ratio=(0.5, 2.0)))
    squashed = TransformConfig(size=32, squash=True)
    assert (whole.int() - evaluation_pixels(image, squashed).int()).abs().float().mean() < 3  # another interpolation


def test_erasing_paints_one_rectangle_of_the_colour() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    shares = []
    for seed in range(200):
        painted = train(image, seed=seed, erase=1.0, erase_colour=(7, 8, 9))
        rows, columns = (painted[0] == 7).nonzero(as_tuple=True)
        height, width = int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1)
        assert height * width == len(rows) and 0.25 < height / width < 4
        assert torch.equal(painted[2] == 9, painted[0] == 7)
        shares.append(len(rows) / 1024)
    assert 0.015 < min(shares) < 0.05 and 0.35 < max(shares) < 0.42
    kept = [torch.equal(train(image, seed=seed, erase=0.3), image) for seed in range(300)]
    assert 0.6 < sum(kept) / 300 < 0.8
