"""Object storage for the tests of the pipeline (a real S3 server), a finished run, and `prepare`."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
import yaml

from pipeline import prepare, train
from pipeline.data.image_files import decode
from pipeline.data.reader import RowGroupReader, open_decoded, open_reader
from pipeline.data.store import Store
from pipeline.distributed.jobs import run_serially
from pipeline.storage import Folder
from pipeline.storage.s3 import S3
from pipeline.testing.tiny import tiny_values, write_tiny_store
from pipeline.training.frozen_figures import FOLDER
from tests.pipeline import shipped
from tests.s3 import s3_server


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket's URI; credentials and endpoint are in the environment, where the product looks for them."""
    for key, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    S3.clear_instance_cache()  # instances remember the endpoint they were made with
    fs = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    fs.mkdir("bucket")
    yield "s3://bucket"
    fs.rm("bucket", recursive=True)
    S3.clear_instance_cache()


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest) -> Folder:
    """An empty folder on this machine, and one in object storage."""
    if request.param == "local":
        return Folder(request.getfixturevalue("tmp_path") / "folder")
    return Folder(request.getfixturevalue("bucket")) / "some" / "folder"


class Base:
    """A storage folder with a dataset of its own and one finished run, "done"; every test leaves it as it was.

    Attributes:
        figures: Names of the files below `frozen` that this run has left; runs of tests may add others.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, write_tiny_store(root)
        self.run = Folder(root / "runs" / "done")
        self.figures: frozenset[str] = frozenset()

    def recipe(self, changes: dict[str, Any] | None = None) -> str:
        """A file for `changes` of the tiny run (keys with dots)."""
        values = tiny_values(
            str(self.root), self.store.folder.uri, {"name": "done", "length": "2 epochs", **(changes or {})}
        )
        path = self.root / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    def files(self) -> dict[str, bytes]:
        return contents(self.root / "runs")


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    made = Base(tmp_path_factory.mktemp("train"))
    assert train.main([made.recipe()]) == 0
    made.figures = frozenset(file.name for file in (made.root / FOLDER).iterdir())
    return made


Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> Cli:
    """Runs the command in this process, without Ray, below a storage of its own; returns its status and what it says."""
    shipped.shrink(monkeypatch)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAYDML_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(prepare, "ray_session", lambda cpus: nullcontext())
    monkeypatch.setattr(prepare, "run_on_ray", run_serially)

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        status = prepare.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert not out and (status == 0 or err.splitlines()[-1].startswith("error: "))
        return status, err

    return run


def pixels(store: Store, ids: Any) -> list[np.ndarray]:
    images = RowGroupReader(store).read(np.asarray(ids, np.int64))
    return [decode(data).permute(1, 2, 0).numpy().astype(int) for data in images]


def rejected(store: Folder) -> dict[str, str]:
    rows = list(csv.reader(io.StringIO(store.read("rejected.csv").decode())))[1:]
    return {Path(source).name: reason for source, _, reason in rows}


@pytest.fixture
def fresh_readers() -> Iterator[None]:
    """Readers are kept for the life of a process."""
    open_reader.cache_clear()
    open_decoded.cache_clear()
    yield
    open_reader.cache_clear()
    open_decoded.cache_clear()


@pytest.fixture
def copy(store: Store, tmp_path: Path) -> Store:
    shutil.copytree(store.folder.path(), tmp_path / "copy")
    return Store(Folder(tmp_path / "copy"))
