"""Shared by all tests: types and shapes are checked at run time, one tiny dataset, one pool of processes."""

# ruff: noqa: E402
from __future__ import annotations

import os

os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of torch, in every process of the pool
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two cores, several processes

from jaxtyping import install_import_hook

install_import_hook(["methods", "pipeline"], "beartype.beartype")  # before either is imported

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from methods import METHODS
from pipeline.config import Config
from pipeline.data.entries import Entry
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.storage import Folder
from tests.pool import Pool, warm_up
from tests.stubs import STUBS, tiny_config

torch.set_num_threads(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Other processes are got ready while the first tests run."""
    if any({"pool", "make_run", "one_proxy"} & set(getattr(item, "fixturenames", ())) for item in session.items):
        warm_up()


def write_images(root: Path, classes: dict[str, int], seed: int, side: int = 24) -> list[tuple[str, str]]:
    """PNGs of noise around a pattern of their class; returns (path, class name) of each.

    Args:
        root: folder to write to.
        classes: number of images by class name.
        seed: of the patterns and the noise.
        side: of the images, pixels.
    """
    random = np.random.default_rng(seed)
    found = []
    for name, count in classes.items():
        pattern = np.kron(random.uniform(102, 152, (4, 4, 3)), np.ones((side // 4, side // 4, 1)))
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.clip(pattern + random.normal(0, 50, pattern.shape), 0, 255).astype(np.uint8)
            path = root / name / f"{i}.png"
            Image.fromarray(pixels).save(path)
            found.append((str(path), name))
    return found


def write_tiny_store(root: Path, seed: int = 0) -> Store:
    """12 training classes of 3 to 7 images and one of a single image, 6 test classes, in 4 folds and several shards."""
    train = {f"train{i:02d}": 3 + i % 5 for i in range(12)} | {"train_single": 1}
    test = {f"test{i:02d}": 3 + i % 5 for i in range(6)}
    images = write_images(root / "images", train | test, seed)
    entries = [Entry(path, name, "train" if name in train else "test") for path, name in images]
    return write_store("tiny", entries, Folder(root / "store"), run_serially, num_folds=4, images_per_shard=16)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The dataset of most tests; not to be written to."""
    return write_tiny_store(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def make_config(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """`make_config(changes, name="tiny")`: a tiny run below the test's own folder; see `tests.stubs.tiny_values`."""
    for name, method in STUBS.items():
        monkeypatch.setitem(METHODS, name, method)

    def make(changes: dict[str, Any] | None = None, name: str = "tiny") -> Config:
        return tiny_config(str(tmp_path), store.folder.uri, {"name": name, **(changes or {})})

    return make


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Three processes for the tests that need ranks; see `tests.pool.Pool`."""
    made = Pool(3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """One Ray for the module, with more logical CPUs than cores."""
    from pipeline.distributed.ray_session import ray_session

    with ray_session(6) as ray:
        yield ray
