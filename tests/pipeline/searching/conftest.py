"""A trained model, an index of its dataset's test images, and that index as a service in this process."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from pipeline import search
from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.inference.load_model import load_model
from pipeline.searching.gate import Limits
from pipeline.searching.index import SearchIndex
from pipeline.searching.service import SearchService, application
from tests.pipeline.conftest import Base


@pytest.fixture(scope="session")
def model(base: Base) -> EmbeddingModel:
    return load_model(base.run.uri)


@pytest.fixture(scope="session")
def built(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the test images of the run's dataset; not to be changed."""
    path = tmp_path_factory.mktemp("index") / "index"
    assert search.main(["build", base.run.uri, "--to", str(path), "--threads", "1"]) == 0
    return path


def png(seed: int = 0, size: tuple[int, int] = (24, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served:
    """A service that answers on a port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}/"

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def raw(self, *parts: bytes) -> bytes:
        """The status line of the answer to bytes that are sent as they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            try:
                for part in parts:
                    connection.sendall(part)
            except ConnectionError:
                pass  # refused while we were sending: the answer is there to be read
            return connection.recv(65536).split(b"\r\n")[0]


class InProcess(Served):
    """The application behind uvicorn in a thread, without Ray; queries are embedded one by one."""

    def __init__(self, index: SearchIndex, limits: Limits, max_pixels: int = 1_000_000) -> None:
        async def embed(pixels: torch.Tensor) -> np.ndarray:
            return index.model.embed_pixels(pixels[None]).cpu().numpy()[0]

        self.service = SearchService(index, embed, max_pixels=max_pixels, threads=1)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            super().__init__(free.getsockname()[1])
        app = application(self.service, limits)
        self.server = uvicorn.Server(
            uvicorn.Config(
                app, "127.0.0.1", self.port, log_level="critical", timeout_graceful_shutdown=1, lifespan="off"
            )
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join()


SMALL = Limits(upload_bytes=200_000, upload_s=1.0, uploads=3)


@pytest.fixture(scope="session")
def served(built: Path, model: EmbeddingModel) -> Iterator[InProcess]:
    service = InProcess(SearchIndex(built, model), SMALL)
    yield service
    service.end()
