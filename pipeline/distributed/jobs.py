"""Independent tasks, streamed through Ray Data: shards to write, files of embeddings to write.

A Ray task does several of them, one record after the other.
Only the tasks and their small records pass through the driver and the object store; what a task
reads and writes goes directly between its process and the storage.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cloudpickle
import pyarrow as pa
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.console import console
from pipeline.errors import RunError, UserError

Work = Callable[[Any], dict[str, Any]]
MAX_TASKS_PER_RAY_TASK = 8  # lost with the node that does them


def run_on_ray(
    function: Work, tasks: Sequence[Any], title: str = "preparing", actors: int = 0, gpus: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Maps a function over tasks, in any order, one CPU each; shows a progress bar.

    Args:
        function: Does one task and returns a small record.
        tasks: Any picklable values whose length is a number of images, which the progress bar
            counts.
        title: Text beside the progress bar.
        actors: The largest number of Ray actors, each with its own copy of `function`; 0: plain Ray
            tasks.
        gpus: GPUs of each actor or Ray task.

    Raises:
        RunError, UserError: The error of a task, as it was raised there.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False

    shares = [1] * len(tasks) if actors else split_evenly(len(tasks), int(ray.cluster_resources().get("CPU", 1)))
    numbers = iter(range(len(tasks)))
    blocks = [_block(list(itertools.islice(numbers, share)), tasks) for share in shares]
    options: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": 1, "num_gpus": gpus}
    dataset = ray.data.from_arrow(blocks)
    dataset.context.target_max_block_size = 1  # every record is given at once, not with the others of its Ray task
    if actors:
        options["compute"] = ray.data.ActorPoolStrategy(min_size=1, max_size=actors)
        records = dataset.map_batches(_Actor, fn_constructor_args=(cloudpickle.dumps(function),), **options)
    else:
        records = dataset.map_batches(functools.partial(_run_block, function=function), **options)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        bar_id = bar.add_task(title, total=sum(len(task) for task in tasks))
        for batch in records.iter_batches(batch_size=None, batch_format="pyarrow"):
            for number, value in zip(batch["number"], batch["record"], strict=True):
                record = cloudpickle.loads(value.as_py())
                if isinstance(record, Exception):
                    raise record
                bar.advance(bar_id, len(tasks[number.as_py()]))
                yield record


def split_evenly(tasks: int, cpus: int) -> list[int]:
    """Numbers of tasks for each Ray task, in order: fewer and fewer, so that all CPUs end together.

    A Ray task takes some 40 ms beside its work, as much as 50 small images.

    Args:
        tasks: Number of tasks.
        cpus: Ray tasks that run at once.
    """
    shares = []
    while tasks:
        shares.append(min(MAX_TASKS_PER_RAY_TASK, max(1, tasks // (4 * max(1, cpus)))))
        tasks -= shares[-1]
    return shares


def _block(numbers: list[int], tasks: Sequence[Any]) -> pa.Table:
    pickled = pa.array([cloudpickle.dumps(tasks[i]) for i in numbers], pa.large_binary())
    return pa.table({"number": pa.array(numbers), "task": pickled})


def run_serially(function: Work, tasks: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Maps a function over tasks in this process, without Ray, in order."""
    return map(function, tasks)


class _Actor:
    def __init__(self, function: bytes) -> None:
        self.function: Work = cloudpickle.loads(function)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        return _run_block(block, self.function)


def _run_block(block: pa.Table, function: Work) -> Iterator[pa.Table]:
    """Does the tasks of a block; a record is what the function returned, or the error that ends the job."""
    for number, task in zip(block["number"], block["task"], strict=True):
        try:
            record: Any = function(cloudpickle.loads(task.as_py()))
        except (RunError, UserError) as error:  # Ray would wrap it
            record = error
        row = {"number": pa.array([number.as_py()]), "record": pa.array([cloudpickle.dumps(record)], pa.large_binary())}
        yield pa.table(row)


__all__ = ["run_on_ray", "run_serially", "split_evenly"]
