"""How a process uses the CPUs: its threads, and that it keeps freed memory.

glibc gives tensors of 32 MB and more back to the system as soon as they are freed, and its pages are cleared anew in the next step:
a third of a training step of a small network, whose activations are that large. Told to keep them
(glibc 2.35 or later), a process goes on holding what its largest step needs.
"""

from __future__ import annotations

import ctypes
import os

# By environment variable, which processes that are started later read: glibc's number of the parameter, and its value. One arena:
# threads other than the main one have arenas of 64 MB each, too small for such tensors.
KEPT = {
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**31 - 1),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_ARENA_MAX": (-8, 1),
}


def use_cpus(threads: int) -> None:
    """Sets the threads of PyTorch's operations, and keeps freed memory."""
    import torch  # here: commands that start Ray and train nothing do without

    keep_freed_memory()
    torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Makes this process, and those that it starts, keep the memory of freed tensors for the next ones.

    Nothing is done where a variable of the environment says otherwise, where a library is preloaded, which may be another allocator,
    and without glibc of 2.35 or later. In this process it is certain for the main thread alone: others may use arenas that are there
    already. In those that it starts it holds for all threads.
    """
    if any(name in os.environ for name in KEPT) or os.environ.get("LD_PRELOAD"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018  # absent in others, whose mallopt differs
    except (AttributeError, OSError, TypeError):
        return
    for name, (number, value) in KEPT.items():
        if not mallopt(number, value):
            return  # before 2.35 the first is refused, and the others alone make it worse
        os.environ[name] = str(value)
