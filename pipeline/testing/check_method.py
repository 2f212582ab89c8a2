"""`check_method(MyMethod)`: one call in a test that holds a method to the laws of this program.

    1. On 1, 2 and 3 workers, with uneven and empty shares, every gradient of every step is the same.
    2. A run that was stopped in the middle of an epoch continues to the same weights, bit for bit.
    3. Nothing is drawn from the global generators of Python and NumPy.

The method trains a network of 0.2 million parameters on 70 small images in float64, in three processes; 10 to 60 s on 2 cores.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from methods import METHODS, Method, method_class, plugins
from pipeline.config import Config, build_config
from pipeline.errors import one_line
from pipeline.testing.tiny import tiny_values, write_tiny_store
from pipeline.testing.watched_run import Seen, StopAt, error, watched

SHARES = ((1,), (7, 5), (6, 0, 6))  # of a batch of 12: the whole, uneven, one worker without images
STOP_AT = 3  # steps of the run of 2 epochs, within the first
TIMEOUT_S = 300


def check_method(
    method: type[Method], config: Mapping[str, Any] | None = None, *, tolerance: float = 1e-7, **changes: Any
) -> None:
    """Holds a method to the laws; call it from a test, with a class that other processes can import.

    Args:
        method: The method, a class at the top of a module.
        config: Keys of its section of a recipe beside the name.
        tolerance: Largest difference of a gradient between numbers of workers, relative to its largest element.
        changes: Further keys of the recipe, with "__" for dots: model__batch_norm="frozen".

    Raises:
        AssertionError: One sentence: which law is broken, at which step, by which parameter.
    """
    name = f"{method.__module__}:{method.__qualname__}"
    if method in METHODS.values():
        name = next(n for n, cls in METHODS.items() if cls is method)
    elif method.__module__ == "__main__" or not plugins.is_import_string(name) or method_class(name) is not method:
        raise AssertionError(f"{name} cannot be imported by another process: define it at the top of a module")
    with tempfile.TemporaryDirectory(prefix="raydml-check-") as root:
        store = write_tiny_store(Path(root)).folder.uri
        keys = {"method.name": name, **{f"method.{key}": value for key, value in (config or {}).items()}}
        keys |= {"length": "2 epochs", "checkpoint.every": "100 epochs", "evaluation.checkpoint": "last"}
        keys |= {key.replace("__", "."): value for key, value in changes.items()}
        build_config(tiny_values(root, store, keys))  # a wrong key is told here
        seen = _in_processes(root, store, keys)
    _check_ranks(seen, tolerance)
    _check_equal(
        seen["whole"], seen["continued"], "a run that was stopped and continued", "state outside of state_dict"
    )
    _check_equal(
        seen["whole"],
        seen["other global seeds"],
        "a run with other global seeds",
        "random numbers that are not context.generator's",
    )


def _check_ranks(seen: Mapping[str, Any], tolerance: float) -> None:
    expected: Seen = seen["ranks 1"][0]
    largest = [float(g.abs().max()) for step in expected.gradients for n, g in step.items() if n.startswith("trunk.")]
    if not largest or max(largest) == 0:
        raise AssertionError("no gradient reaches the trunk: does the loss depend on the features of context.encode?")
    scale = _largest_by_name(expected)
    for shares in SHARES[1:]:
        for rank, got in enumerate(seen[f"ranks {len(shares)}"]):
            where = f"on {len(shares)} workers (rank {rank})"
            if [list(g) for g in got.gradients] != [list(g) for g in expected.gradients]:
                raise AssertionError(
                    f"{where} other parameters have gradients, or other steps are made, than on one worker"
                )
            for step, (found, wanted) in enumerate(zip(got.gradients, expected.gradients, strict=True)):
                errors = {n: error(found[n], wanted[n], max(scale[n], 1e-6)) for n in wanted}
                worst = max(errors, key=errors.__getitem__)
                if errors[worst] > tolerance:
                    raise AssertionError(
                        f"{where} the gradient of {worst} differs at optimizer step {step} by {errors[worst]:.1e} of its size from "
                        "that of one worker: every rank has to compute the same from context.encode, and sum nothing by itself"
                    )


def _largest_by_name(seen: Seen) -> dict[str, float]:
    """The largest element of each parameter's gradients over the run."""
    found: dict[str, float] = {}
    for step in seen.gradients:
        for name, gradient in step.items():
            found[name] = max(found.get(name, 0.0), float(gradient.abs().max()))
    return found


def _check_equal(whole: dict[str, Tensor], other: dict[str, Tensor], what: str, cause: str) -> None:
    different = [name for name, value in whole.items() if not torch.equal(value, other[name])]
    if different:
        raise AssertionError(
            f"{what} ends with other weights ({different[0]} and {len(different) - 1} more of {len(whole)}): the method has {cause}"
        )


# ---- the processes ---------------------------------------------------------------------------------------------------


def _in_processes(root: str, store: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """What each run leaves, by name."""
    context = _process_context()
    arguments = (root, store, dict(keys), list(sys.path), dict(os.environ))
    processes = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(len(SHARES))]
    for process in processes:
        process.start()
    end = time.monotonic() + TIMEOUT_S
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes) and time.monotonic() < end:
        time.sleep(0.05)
    finished = all(process.exitcode == 0 for process in processes)
    for process in processes:
        process.kill()  # the others of one that failed would wait for it
    failures = sorted(Path(root).glob("failed-*"))
    if failures:
        raise AssertionError(failures[0].read_text())
    if not finished:
        raise AssertionError(f"the processes of the check did not end within {TIMEOUT_S} s, or died")
    seen: dict[str, Any] = torch.load(f"{root}/alone.pt", weights_only=False)
    for world in range(1, len(SHARES) + 1):
        seen[f"ranks {world}"] = [
            torch.load(f"{root}/seen-{world}-{rank}.pt", weights_only=False) for rank in range(world)
        ]
    return seen


def _process_context() -> Any:
    """How the processes are started: from one server that has imported PyTorch and this program, where there are such servers.

    A program that has started Python's fork server before keeps its own.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _rank(rank: int, root: str, store: str, keys: dict[str, Any], path: list[str], environment: dict[str, str]) -> None:
    """One process: its part of the runs on several workers; the first makes the runs of one worker too."""
    sys.path[:] = path
    os.environ.update(environment)  # of now: a fork server has that of its start
    torch.set_num_threads(1)
    try:
        for world, shares in enumerate(SHARES, 1):
            if rank >= world:
                continue
            if world > 1:
                group = f"file://{root}/group-{world}"
                limit = timedelta(seconds=TIMEOUT_S)
                dist.init_process_group("gloo", init_method=group, rank=rank, world_size=world, timeout=limit)
            config = _config(root, store, keys, f"ranks-{world}")
            torch.save(watched(config, rank, shares), f"{root}/seen-{world}-{rank}.pt")
            if world > 1:
                dist.destroy_process_group()
        if rank == 0:
            torch.save(_alone(root, store, keys), f"{root}/alone.pt")
    except Exception as failure:
        text = f"{one_line(failure)}\n{traceback.format_exc()}"
        Path(f"{root}/failed-{rank}").write_text(text)
        sys.exit(1)


def _alone(root: str, store: str, keys: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Weights after a whole run, after one that was stopped and continued, and after one with other global seeds."""
    found = {}
    for name in ("whole", "continued", "other global seeds"):
        seed = int(name != "whole")
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        config = _config(root, store, keys, name.replace(" ", "-"))
        if name == "continued":
            watched(config, 0, (1,), StopAt(STOP_AT))
        found[name] = watched(config, 0, (1,)).after
    return found


def _config(root: str, store: str, keys: dict[str, Any], name: str) -> Config:
    return build_config(tiny_values(root, store, {**keys, "name": name}))
