"""Independent tasks, streamed through Ray Data: shards to write, files of embeddings to write.

Only the tasks and their small records pass through the driver and the object store; what a task
reads and writes goes directly between its process and the storage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cloudpickle
import pyarrow as pa
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.console import console
from pipeline.errors import RunError, UserError

Work = Callable[[Any], dict[str, Any]]


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

    blocks = [
        pa.table({"number": pa.array([i]), "task": pa.array([cloudpickle.dumps(task)], pa.large_binary())})
        for i, task in enumerate(tasks)
    ]
    options: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": 1, "num_gpus": gpus}
    dataset = ray.data.from_arrow(blocks)
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


def run_serially(function: Work, tasks: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Maps a function over tasks in this process, without Ray, in order."""
    return map(function, tasks)


class _Actor:
    def __init__(self, function: bytes) -> None:
        self.function: Work = cloudpickle.loads(function)

    def __call__(self, block: pa.Table) -> pa.Table:
        return _run_block(block, self.function)


def _run_block(block: pa.Table, function: Work) -> pa.Table:
    """Does the tasks of a block; a record is what the function returned, or the error that ends the job."""
    records = []
    for task in block["task"]:
        try:
            record: Any = function(cloudpickle.loads(task.as_py()))
        except (RunError, UserError) as error:  # Ray would wrap it
            record = error
        records.append(cloudpickle.dumps(record))
    return pa.table({"number": block["number"], "record": pa.array(records, pa.large_binary())})


__all__ = ["run_on_ray", "run_serially"]
