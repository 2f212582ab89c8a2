"""A proxy before the S3 server that spoils requests, and an empty folder behind it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from pipeline.data.store import Store
from pipeline.storage import Folder, s3
from tests.s3 import Proxy

NUMBERS = itertools.count()
SECRET = "wJalrXUtnFEMI-K7MDENG-not-to-be-written"


@pytest.fixture(scope="module")
def one_proxy(s3_endpoint: str) -> Iterator[Proxy]:
    """The only endpoint in this module; faults may last 30 seconds."""
    proxy = Proxy(s3_endpoint)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            s3.RETRY_TIMEOUT: "30",
        }.items():
            patch.setenv(name, value)
        s3.S3.clear_instance_cache()
        s3.S3(s3.retry_timeout()).mkdir("faults")
        yield proxy
        proxy.reset()
        s3.S3(s3.retry_timeout()).rm("faults", recursive=True)
    s3.S3.clear_instance_cache()
    proxy.close()


@pytest.fixture
def proxy(one_proxy: Proxy) -> Iterator[Proxy]:
    """Without faults yet."""
    one_proxy.reset()
    yield one_proxy
    one_proxy.reset()


@pytest.fixture
def place(proxy: Proxy) -> Folder:
    """An empty folder behind the proxy."""
    return Folder(f"s3://faults/{next(NUMBERS)}")


def copy_store(store: Store, target: Folder) -> Folder:
    for name in store.folder.find():
        target.write(name, store.folder.read(name))
    return target
