"""Plan rows to pixels: one function that fetches, decodes and augments, run in this process or as a Ray Data pipeline.

Both engines take the same requests and give the same bytes in the same order. The Ray engine is a
pipeline inside each worker over that worker's slice of the plan: several requests in a block, several blocks from a task
(one task has some 40 ms of overhead), uint8 pixels, order preserved, limited to the worker's share of
loader CPUs. A task gives its blocks one after the other, as they are fetched, so that its overhead is
that of several blocks. It takes seconds to start the first time in a cluster and a tenth of a second
later, so one pipeline serves a whole segment of the plan; but the requests of every task are put into
the object store before the first is fetched, which takes 5 CPU-ms of each, so a long segment is served
by several.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from pipeline.data.cache import Cache
from pipeline.data.decoded import DecodedReader
from pipeline.data.image_files import decode
from pipeline.data.reader import Reader, open_images
from pipeline.data.transforms import TransformConfig, evaluation_pixels, training_pixels

PREFETCH = 2  # requests fetched before they are needed, in process
BLOCK_BYTES = 32 * 2**20  # pixels in one Ray Data block
MAX_REQUESTS_PER_BLOCK = 8
BLOCKS_PER_TASK = (
    8  # of all tasks that run at once together: what waits for an earlier task stays within so many blocks
)
REQUESTS_PER_PIPELINE = 4096  # upper bound for one Ray Data pipeline, of which little is kept when training stops early
PAUSE_S = 0.02  # between two steps of Ray Data's scheduling loop


@dataclass(frozen=True)
class ImageSource:
    """The source of images and their transforms, the same for every request.

    Attributes:
        uri, fingerprint: Address of the store, and the content that it must have.
        cache: The folder of this node's copy of the training split, encoded or decoded; None: row groups are read.
        transforms: Settings that turn images into pixels.
        seed: The run's seed, first number of every augmentation's key.
        node_labels: Labels of the nodes that Ray Data fetches images on; empty: any node.
    """

    uri: str
    fingerprint: str
    cache: Cache | None
    transforms: TransformConfig
    seed: int = 0
    node_labels: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class LoadRequest:
    """Images of one step for one worker.

    Attributes:
        ids: Store sample ids.
        key: (epoch, step, first slot) for augmented training pixels; None for evaluation pixels.
    """

    ids: Int64[np.ndarray, " images"]
    key: tuple[int, int, int] | None = None


def fetch(
    source: ImageSource,
    request: LoadRequest,
    next_request: LoadRequest | None = None,
    out: UInt8[np.ndarray, "images 3 size size"] | None = None,
) -> UInt8[np.ndarray, "images 3 size size"]:
    """Reads, decodes and transforms one request; a pure function of source, request and the store.

    Args:
        source: The store and the transforms.
        request: The images to fetch.
        next_request: The request after it, whose bytes are prefetched meanwhile.
        out: Array to write into; None: a new one.
    """
    reader = open_images(source.uri, source.fingerprint, source.cache)
    reader.prefetch(request.ids)
    if next_request is not None:
        reader.prefetch(next_request.ids)
    size = source.transforms.size
    if out is None:
        out = np.empty((len(request.ids), 3, size, size), dtype=np.uint8)
    for i, image in enumerate(_images(reader, request, source.transforms)):
        if request.key is None:
            pixels = evaluation_pixels(image, source.transforms)
        else:
            epoch, step, slot = request.key
            random = np.random.Generator(np.random.PCG64([source.seed, epoch, step, slot + i]))
            pixels = training_pixels(image, source.transforms, random)
        out[i] = pixels.numpy()
    return out


def _images(reader: Reader | DecodedReader, request: LoadRequest, transforms: TransformConfig) -> Iterator[Tensor]:
    """Decoded images of a request, one after the other."""
    if isinstance(reader, DecodedReader):
        return reader.images(request.ids)
    least_side = None if request.key is None else transforms.decode_at_least
    return (decode(data, least_side) for data in reader.read(request.ids))


def load(
    source: ImageSource, requests: Iterable[LoadRequest], engine: str, loader_cpus: int = 1
) -> Generator[UInt8[Tensor, "images 3 size size"], None, None]:
    """Pixels of every request, in order. Requests are taken when needed: memory does not grow with their number.

    Args:
        source: The store and the transforms.
        requests: The images of each step.
        engine: "ray" or "in_process".
        loader_cpus: CPUs of this worker's Ray Data pipeline.
    """
    requests = iter(requests)
    if engine != "ray":
        yield from _load_in_process(source, requests)
        return
    while segment := list(islice(requests, REQUESTS_PER_PIPELINE)):
        if any(len(request.ids) for request in segment):
            yield from _load_ray(source, segment, loader_cpus)
        else:
            yield from _load_in_process(source, iter(segment))


def _load_in_process(source: ImageSource, requests: Iterator[LoadRequest]) -> Iterator[Tensor]:
    """Pixels fetched by a thread before they are needed: decoding releases the interpreter lock."""
    pairs = _with_next(requests)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
        pending = deque(pool.submit(fetch, source, *pair) for pair in islice(pairs, PREFETCH))
        try:
            while pending:
                pixels = pending.popleft().result()
                pending.extend(pool.submit(fetch, source, *pair) for pair in islice(pairs, 1))
                yield torch.from_numpy(pixels)
        finally:
            for future in pending:
                future.cancel()


def _with_next(requests: Iterable[LoadRequest]) -> Iterator[tuple[LoadRequest, LoadRequest | None]]:
    """Pairs of a request and the one after it; None after the last."""
    request: LoadRequest | None = None
    for next_request in requests:
        if request is not None:
            yield request, next_request
        request = next_request
    if request is not None:
        yield request, None


def request_blocks(requests: Sequence[LoadRequest], per_block: int) -> list[pa.Table]:
    """Tables of `per_block` requests each, with the columns ids, epoch, step, slot; -1 where there is no key."""
    keys = [request.key or (-1, -1, -1) for request in requests]
    numbers = {name: pa.array([key[i] for key in keys], pa.int64()) for i, name in enumerate(("epoch", "step", "slot"))}
    table = pa.table({"ids": pa.array([request.ids for request in requests], pa.list_(pa.int64())), **numbers})
    return [table.slice(i, per_block) for i in range(0, len(requests), per_block)]


def _fetch_blocks(rows: pa.Table, source: ImageSource, per_block: int) -> Iterator[pa.Table]:
    """Pixels of the requests of a task, `per_block` requests at a time."""
    torch.set_num_threads(1)  # one task, one CPU
    requests = []
    for row in rows.to_pylist():
        key = None if row["epoch"] < 0 else (row["epoch"], row["step"], row["slot"])
        requests.append(LoadRequest(np.array(row["ids"], dtype=np.int64), key))
    pairs = list(_with_next(requests))
    for start in range(0, len(pairs), per_block):
        yield _fetch_block(pairs[start : start + per_block], source)


def _fetch_block(pairs: list[tuple[LoadRequest, LoadRequest | None]], source: ImageSource) -> pa.Table:
    # the buffer that Ray ships: pixels are written once
    offsets = np.cumsum([0, *(len(request.ids) for request, _ in pairs)])
    size = source.transforms.size
    pixels = np.empty((offsets[-1], 3, size, size), dtype=np.uint8)
    for pair, start, stop in zip(pairs, offsets[:-1], offsets[1:], strict=True):
        fetch(source, *pair, out=pixels[start:stop])
    buffers = [None, pa.py_buffer(offsets * (3 * size * size)), pa.py_buffer(pixels)]
    return pa.table({"pixels": pa.Array.from_buffers(pa.large_binary(), len(pairs), buffers)})


class ThrottleCallback:
    """A Ray Data execution callback that sleeps after each scheduling step.

    While the pipeline waits for its consumer, Ray's scheduling loop runs without a pause, in a
    thread of the training process: it took a core and the interpreter lock, and training ran at a
    third of its speed.
    """

    def before_execution_starts(self, executor: Any) -> None: ...

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(PAUSE_S)

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


def _load_ray(source: ImageSource, requests: Sequence[LoadRequest], loader_cpus: int) -> Iterator[Tensor]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if ThrottleCallback not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(ThrottleCallback)  # type: ignore[arg-type]  # its base class is not public
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=loader_cpus)
    size = source.transforms.size
    largest = max(len(request.ids) for request in requests) * 3 * size * size
    per_block = max(1, min(MAX_REQUESTS_PER_BLOCK, BLOCK_BYTES // largest))
    shares = -(-len(requests) // (per_block * loader_cpus))  # blocks for each CPU
    per_task = per_block * max(1, min(BLOCKS_PER_TASK // loader_cpus, shares))
    dataset = ray.data.from_arrow(request_blocks(requests, per_task)).map_batches(
        functools.partial(_fetch_blocks, source=source, per_block=per_block),
        batch_size=None, batch_format="pyarrow", num_cpus=1, label_selector=source.node_labels or None,
    )  # fmt: skip
    dataset.context.target_max_block_size = per_block * largest  # a full block is given at once
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for value in block["pixels"]:
            pixels = np.frombuffer(value.as_buffer(), dtype=np.uint8).reshape(-1, 3, size, size)
            yield torch.from_numpy(pixels.copy())
