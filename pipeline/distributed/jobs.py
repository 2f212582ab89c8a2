"""Independent pieces of work, streamed through Ray Data: shards to write, parts to embed.

Only the pieces and small records of them pass through the driver and the object store; what a piece reads and writes goes
between its task and the storage.
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
    function: Work, pieces: Sequence[Any], title: str = "preparing", actors: int = 0, gpus: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Maps over pieces (with lengths, in images), in any order, one CPU each; shows a progress bar.

    Args:
        function: what is done to a piece; gives a small record.
        pieces: of work.
        title: of the progress bar.
        actors: work in at most so many processes that keep their copy of `function`; 0: in tasks.
        gpus: of each.

    Raises:
        RunError, UserError: of a piece, as it raised it.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False

    blocks = [
        pa.table({"number": pa.array([i]), "piece": pa.array([cloudpickle.dumps(piece)], pa.large_binary())})
        for i, piece in enumerate(pieces)
    ]
    how: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": 1, "num_gpus": gpus}
    dataset = ray.data.from_arrow(blocks)
    if actors:
        how["compute"] = ray.data.ActorPoolStrategy(min_size=1, max_size=actors)
        done = dataset.map_batches(_Actor, fn_constructor_args=(cloudpickle.dumps(function),), **how)
    else:
        done = dataset.map_batches(functools.partial(_work, function=function), **how)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=sum(len(piece) for piece in pieces))
        for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            for number, value in zip(batch["number"], batch["record"], strict=True):
                record = cloudpickle.loads(value.as_py())
                if isinstance(record, Exception):
                    raise record
                bar.advance(task, len(pieces[number.as_py()]))
                yield record


def run_serially(function: Work, pieces: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The same in this process, without Ray."""
    return map(function, pieces)


class _Actor:
    def __init__(self, function: bytes) -> None:
        self.function: Work = cloudpickle.loads(function)

    def __call__(self, block: pa.Table) -> pa.Table:
        return _work(block, self.function)


def _work(block: pa.Table, function: Work) -> pa.Table:
    """One piece in, its record out, or the error that ends the whole."""
    records = []
    for piece in block["piece"]:
        try:
            record: Any = function(cloudpickle.loads(piece.as_py()))
        except (RunError, UserError) as error:  # Ray would wrap it
            record = error
        records.append(cloudpickle.dumps(record))
    return pa.table({"number": block["number"], "record": pa.array(records, pa.large_binary())})


__all__ = ["run_on_ray", "run_serially"]
