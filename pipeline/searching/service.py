"""The HTTP service of an index, as an ASGI application; `pipeline.searching.replica` runs it in Ray Serve.

    POST /search?k=10     an image as the body, or as the first file of multipart/form-data: {"neighbours": [...]}
    GET  /thumbnail/ID    a small JPEG of an image of the index
    GET  /info            number of images, dimensions, distance, model, engine
    GET  /health          {"status": "ok"}, or 503
    GET  /metrics         for Prometheus
    GET  /                a page to drop an image on

Status codes: 400 an empty query or a wrong k, 413 too many pixels, 415 no image, 422 a damaged image, 503 an index that is gone.
Texts leave as JSON only; the page puts them into the document as text.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from pipeline.data.transforms import evaluation_pixels
from pipeline.errors import UserError, one_line
from pipeline.exploration.shown_names import shown_name
from pipeline.inference.image_inputs import ImageError, read_input
from pipeline.searching.gate import Gate, Limits
from pipeline.searching.index import SearchHit, SearchIndex

MAX_K = 100
_SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/results.css": ("results.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


class SearchService:
    """Answers queries.

    Args:
        index: The index; its model is loaded here.
        embed: Embeds the pixels of one image, [3, S, S] to [D]; the replica puts images together into batches.
        max_pixels: Largest width × height of an image.
        threads: Images that are decoded at once.
    """

    def __init__(
        self,
        index: SearchIndex,
        embed: Callable[[Tensor], Awaitable[np.ndarray]],
        *,
        max_pixels: int = 50_000_000,
        threads: int = 2,
    ) -> None:
        self.index, self.embed, self.max_pixels = index, embed, max_pixels
        self.model = index.model
        self.decoding = ThreadPoolExecutor(threads, thread_name_prefix="decoding")
        self.searching = ThreadPoolExecutor(threads, thread_name_prefix="searching")
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "raydml_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram("raydml_search_seconds", "Time of an answered search", registry=self.registry,
                                 buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10))  # fmt: skip
        self.batches = Histogram("raydml_batch_images", "Images embedded together", registry=self.registry,
                                 buckets=(1, 2, 4, 8, 16, 32))  # fmt: skip
        self.images = Gauge("raydml_index_images", "Images that can be found", registry=self.registry)
        self.images.set_function(lambda: len(self.index))

    async def search(self, data: bytes, k: int) -> list[SearchHit]:
        """The neighbours of an encoded image.

        Raises:
            HTTPException: It is no image, is damaged, or has too many pixels; the index is gone.
        """
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self.decoding, self._pixels, data)
        embedding = await self.embed(pixels)
        return await loop.run_in_executor(self.searching, self._search, embedding, k)

    def _pixels(self, data: bytes) -> Tensor:
        """An encoded image, preprocessed."""
        try:
            with Image.open(io.BytesIO(data)) as image:  # reads the header only
                width, height = image.size
        except Image.DecompressionBombError as error:
            raise HTTPException(413, f"the image has more than {self.max_pixels:,} pixels") from error
        except UnidentifiedImageError as error:
            raise HTTPException(415, "the upload is not an image of a known format") from error
        except Exception as error:  # decoders have no common class of errors
            raise HTTPException(422, f"the image cannot be read: {one_line(error)}") from error
        if width * height > self.max_pixels:
            raise HTTPException(
                413, f"the image has {width:,} × {height:,} pixels, at most {self.max_pixels:,} are accepted"
            )
        try:
            return evaluation_pixels(read_input("the image", data, self.max_pixels), self.model.transforms)
        except ImageError as error:
            reason = error.reason.partition(" (")[0]  # what a decoder adds is of use to nobody there
            raise HTTPException(422, f"the image cannot be read: {reason}") from error

    def _search(self, embedding: np.ndarray, k: int) -> list[SearchHit]:
        try:
            self.index.refresh()
            return self.index.search(embedding, k)[0]
        except UserError as error:
            raise HTTPException(503, one_line(error)) from error


def application(service: SearchService, limits: Limits) -> Any:
    """The ASGI application, with its gate."""
    started = time.time()
    pages = {
        path: (Path(__file__).parent / "page" / name).read_bytes() for path, (name, _) in _PAGE.items()
    }  # read before the first request

    async def page(request: Request) -> Response:
        path = request.url.path
        return Response(pages[path], media_type=_PAGE[path][1])

    async def search(request: Request) -> Response:
        began = time.perf_counter()
        k = _k(request)
        data = await _upload(request)
        if not data:
            raise HTTPException(
                400, "the query is empty: send an image as the body, or as a file of multipart/form-data"
            )
        hits = await service.search(data, k)
        seconds = time.perf_counter() - began
        service.seconds.observe(seconds)
        return JSONResponse({"neighbours": [_as_json(hit) for hit in hits], "milliseconds": round(1e3 * seconds, 1)})

    async def thumbnail(request: Request) -> Response:
        data = service.index.thumbnail(request.path_params["image"])
        if data is None:
            raise HTTPException(404, "there is no such thumbnail")
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})

    async def info(_: Request) -> Response:
        manifest = service.index.manifest
        return JSONResponse(
            {
                "images": manifest.rows,
                "dimensions": manifest.dim,
                "distance": manifest.distance,
                "model": service.model.name,
                "fingerprint": manifest.model.fingerprint,
                "engine": manifest.engine.name,
                "recall": manifest.engine.recall,
                "max_k": MAX_K,
            }
        )

    async def health(_: Request) -> Response:
        try:
            service.index.refresh()
        except UserError as error:
            return JSONResponse({"status": "failed", "error": one_line(error)}, 503)
        return JSONResponse({"status": "ok", "seconds": round(time.time() - started)})

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(service.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"the search failed ({type(error).__name__})"}, 500)

    routes = [
        *(Route(path, page) for path in _PAGE),
        Route("/search", search, methods=["POST"]),
        Route("/thumbnail/{image:int}", thumbnail),
        Route("/info", info),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: refused, Exception: failed})
    return _Answered(Gate(app, limits), service)


class _Answered:
    """Counts the answers, and gives all of them the headers of a page that may load nothing from elsewhere."""

    def __init__(self, app: Any, service: SearchService) -> None:
        self.app, self.service = app, service
        self.paths = {*_PAGE, "/search", "/info", "/health", "/metrics"}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"]
                known = path if path in self.paths else "/thumbnail" if path.startswith("/thumbnail/") else "other"
                self.service.requests.labels(known, message["status"]).inc()
                names = {name.lower() for name, _ in message["headers"]}
                more = {**_SECURITY} | ({} if b"cache-control" in names else {"Cache-Control": "no-store"})
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in more.items())]
            await send(message)

        await self.app(scope, receive, counted)


def _k(request: Request) -> int:
    text = request.query_params.get("k", "10")
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_K):
        raise HTTPException(400, f"k has to be a number from 1 to {MAX_K}")
    return int(text)


def _as_json(hit: SearchHit) -> dict[str, Any]:
    """What is told of an image that was found; `shown_name` is the name of its class in words."""
    return {**dataclasses.asdict(hit), "shown_name": None if hit.class_name is None else shown_name(hit.class_name)}


async def _upload(request: Request) -> bytes:
    """The image of a request: its body, or the first file of a form."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        return await request.body()
    try:
        async with request.form(max_files=1, max_fields=8) as form:
            for value in form.values():
                if not isinstance(value, str):
                    return await value.read()
    except (MultiPartException, KeyError) as error:
        raise HTTPException(400, f"the form cannot be read: {one_line(error)}") from error
    return b""


__all__ = ["MAX_K", "SearchService", "application"]
