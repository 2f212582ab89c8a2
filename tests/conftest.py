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

import pytest
import torch

from methods import METHODS
from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.testing.tiny import write_tiny_store
from tests.pool import Pool, warm_up
from tests.stubs import STUBS, tiny_config

torch.set_num_threads(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Other processes are got ready while the first tests run."""
    if any({"pool", "make_run", "one_proxy"} & set(getattr(item, "fixturenames", ())) for item in session.items):
        warm_up()


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
