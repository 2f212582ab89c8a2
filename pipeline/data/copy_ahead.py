"""Batches on their device one step before they are needed, where that is a GPU: pinned memory, a stream of its own.

A thread takes each batch from the loader, copies it into pinned memory, and starts its copy to the GPU beside the step that is being
computed; neither the step nor the host waits for it. On a CPU batches are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Starts the copy of a batch, in the thread; gives it to the step when it is called there.
StartCopy = Callable[[Tensor], Callable[[], Tensor]]


def on_device(batches: Generator[Tensor, None, None], device: torch.device) -> Generator[Tensor, None, None]:
    """The batches of a loader, on the device of the network.

    Args:
        batches: The loader; it is closed with what is returned.
        device: The device; pixels for a CPU stay where they are.
    """
    return one_ahead(batches, _gpu_copies(device)) if device.type == "cuda" else batches


def one_ahead(batches: Generator[Tensor, None, None], start_copy: StartCopy) -> Generator[Tensor, None, None]:
    """Batches whose copy is started by a thread while the one before is used.

    Args:
        batches: The batches, in order; their errors are raised where the batch would come.
        start_copy: Starts the copy of one.
    """

    def take() -> Callable[[], Tensor] | None:
        pixels = next(batches, None)
        return None if pixels is None else start_copy(pixels)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="copy") as thread:
        try:
            pending = thread.submit(take)
            while (receive := pending.result()) is not None:
                pending = thread.submit(take)
                yield receive()
        finally:
            thread.shutdown(wait=True, cancel_futures=True)  # a generator that runs cannot be closed
            batches.close()


def _gpu_copies(device: torch.device) -> StartCopy:
    """Copies to a GPU in a stream of their own."""
    stream = torch.cuda.Stream(device)

    def start(pixels: Tensor) -> Callable[[], Tensor]:
        with torch.cuda.stream(stream):
            copied = pixels.pin_memory().to(
                device, non_blocking=True
            )  # the allocator keeps what is pinned until it is copied
            done = stream.record_event()

        def receive() -> Tensor:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            copied.record_stream(current)  # or its memory would be used again while the step still reads it
            return copied

        return receive

    return start
