"""`python -m pipeline.search build|query|add|remove|info`: an index of images, and what is nearest to an image.

    python -m pipeline.search build emoji --to INDEX                    the test images of the run's own dataset
    python -m pipeline.search build emoji --images photos/ --to INDEX   all images below a folder; FOLDER/CLASS/IMAGE names classes
    python -m pipeline.search build emoji --embeddings out --to INDEX   what `pipeline.evaluate emoji --embed-to out` has written
    python -m pipeline.search query INDEX a.jpg b.jpg -k 10 --html found.html
    python -m pipeline.search add INDEX more/ c.jpg                     an image of a path that is there already takes its place
    python -m pipeline.search remove INDEX more/ c.jpg
    python -m pipeline.search info INDEX                                model, images, engine and its measured recall

`raydml serve INDEX` answers over HTTP; `raydml.open_index(INDEX)` in Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pipeline.errors import RunError, UserError, fail

if TYPE_CHECKING:
    from pipeline.searching.changes import Change, IndexBatch
    from pipeline.searching.images import Embedding
    from pipeline.searching.index import SearchIndex

PROG = "python -m pipeline.search"
SPLITS_OF = {"test": ("test", "query", "gallery"), "train": ("train",), "all": ("train", "test", "query", "gallery")}
ENGINES = (
    "auto",
    "exact",
    "ivf",
    "ivf_fp16",
    "ivf_pq",
    "hnsw",
)  # `pipeline.searching.engines.ENGINES`, which loads faiss
_REJECTED_SHOWN = 5


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="build | query | add | remove | info")
    build = commands.add_parser("build", help="write a new index")
    build.add_argument("model", metavar="RUN", help="a run, its folder or URI; or an exported model")
    build.add_argument("--to", required=True, metavar="INDEX", help="a local folder that does not exist, or is empty")
    source = build.add_mutually_exclusive_group()
    source.add_argument("--images", metavar="FOLDER", help="all images below it; FOLDER/CLASS/IMAGE names the classes")
    source.add_argument("--embeddings", metavar="URI", help="a folder that `evaluate RUN --embed-to` has written")
    build.add_argument("--split", choices=SPLITS_OF, help="images of the run's dataset (default: test)")
    build.add_argument("--checkpoint", help="best, last, or a step (default: the run's evaluation.checkpoint)")
    build.add_argument("--engine", choices=ENGINES, default="auto", help="auto: exact up to 256 MB of embeddings")
    build.add_argument("--no-thumbnails", action="store_true", help="keep no small pictures")
    query = commands.add_parser("query", help="the nearest images of some images")
    query.add_argument("index", metavar="INDEX")
    query.add_argument("images", nargs="+", metavar="IMAGE", help="paths or URIs of images or folders")
    query.add_argument("-k", type=int, default=10, help="neighbours of each image (default: 10)")
    query.add_argument("--html", metavar="PATH", help="write a page with pictures into this file")
    add = commands.add_parser("add", help="append images")
    add.add_argument("index", metavar="INDEX")
    add.add_argument("images", nargs="+", metavar="IMAGE", help="paths or URIs of images or folders")
    add.add_argument(
        "--class", dest="class_name", metavar="NAME", help="class of all of them (default: by their folders)"
    )
    remove = commands.add_parser("remove", help="remove images by their paths, or all below a folder")
    remove.add_argument("index", metavar="INDEX")
    remove.add_argument("paths", nargs="+", metavar="PATH")
    info = commands.add_parser("info", help="what an index is")
    info.add_argument("index", metavar="INDEX")
    info.add_argument("--verify", action="store_true", help="compare the checksums of all its files")
    for command in (query, add):
        command.add_argument("--model", help="the model (default: where the index says that it is)")
    for command in (build, add):
        command.add_argument("--threads", type=int, help="threads that read and decode (default: one a core)")
    for command in (build, query, add, remove, info):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 done, 1 a failure (a full disk), 2 bad input, 130 interrupted."""
    options = build_parser(prog).parse_args(arguments)
    try:
        _COMMANDS[options.command](options)
    except UserError as error:
        return fail(error, 2)
    except RunError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was changed", file=sys.stderr)
        return 130
    return 0


def _build(options: argparse.Namespace) -> None:
    from pipeline.searching.index_files import MANIFEST, ModelRecord, index_folder

    if options.split and (options.images or options.embeddings):
        raise UserError("--split goes with the run's own dataset, not with --images or --embeddings")
    folder = index_folder(options.to)
    if folder.exists(MANIFEST):
        raise UserError(f"{folder} holds an index already: add images to it, or remove the folder to build it again")
    from pipeline.inference.load_model import load_model
    from pipeline.searching.changes import build_index
    from pipeline.searching.images import THUMBNAIL_SIDE, Embedding

    started = time.perf_counter()
    model = load_model(options.model, options.checkpoint)
    embedding = Embedding(model, not options.no_thumbnails, _threads(options))
    if options.images:
        batches = embedding.of_files([options.images])
    else:
        store = None
        if not (options.embeddings and options.no_thumbnails):
            from pipeline.inference.trained_model import load_run

            store = load_run(options.model, options.checkpoint).store()
        if options.embeddings:
            batches = embedding.of_embeddings(options.embeddings, store)
        else:
            assert store is not None
            batches = embedding.of_store(store, SPLITS_OF[options.split or "test"])
    record = ModelRecord(source=model.source, checkpoint=options.checkpoint, fingerprint=model.fingerprint)
    side = 0 if options.no_thumbnails else THUMBNAIL_SIDE
    change = build_index(
        options.to, record, model.dim, model.distance, _shown(batches, "embedding"),
        engine=options.engine, thumbnail_side=side, threads=_threads(options),
    )  # fmt: skip
    _tell_rejected(embedding)
    _print_change(options, change, f"{change.added:,} images in {time.perf_counter() - started:.1f} s: {options.to}")


def _query(options: argparse.Namespace) -> None:
    if options.k < 1:
        raise UserError(f"-k is {options.k}, expected 1 or more")
    index = _open(options)
    from pipeline.searching.images import thumbnail

    queries, found = [], []
    for batch in index.model.embed_batches(options.images):
        if batch.rejected:
            raise batch.rejected[0]
        found += index.search(batch.embeddings, options.k)
        queries += [(name, thumbnail(pixels)) for name, pixels in zip(batch.names, batch.pixels, strict=True)]
    if options.html:
        from pipeline.searching.result_page import result_page

        try:
            with open(options.html, "wb") as file:
                file.write(result_page(index, queries, found))
        except OSError as error:
            raise UserError(f"{options.html} cannot be written: {error.strerror}") from error
    if options.json:
        answers = [
            {"query": name, "neighbours": [dataclasses.asdict(hit) for hit in hits]}
            for (name, _), hits in zip(queries, found, strict=True)
        ]
        print(json.dumps(answers, indent=1))
        return
    from pipeline.console import aligned
    from pipeline.exploration.shown_names import shown_name

    for (name, _), hits in zip(queries, found, strict=True):
        print(name)
        rows = [
            (f"  {rank}", f"{hit.similarity:.4f}", shown_name(hit.class_name or ""), hit.path)
            for rank, hit in enumerate(hits, 1)
        ]
        print("\n".join(aligned(rows)) if rows else "  nothing: the index is empty")


def _add(options: argparse.Namespace) -> None:
    index = _open(options)
    from pipeline.searching.changes import add_to_index
    from pipeline.searching.images import Embedding

    embedding = Embedding(index.model, index.manifest.thumbnail_side > 0, _threads(options))
    batches = embedding.of_files(options.images, options.class_name)
    change = add_to_index(options.index, _shown(batches, "embedding"), _threads(options))
    _tell_rejected(embedding)
    _print_change(
        options, change, f"{change.added:,} images added, {change.replaced:,} of them in place of earlier ones"
    )


def _remove(options: argparse.Namespace) -> None:
    from pipeline.searching.index_files import index_folder, read_manifest

    read_manifest(index_folder(options.index))  # before faiss is loaded
    from pipeline.searching.changes import remove_from_index

    change = remove_from_index(options.index, options.paths)
    _print_change(options, change, f"{change.removed:,} images removed")


def _info(options: argparse.Namespace) -> None:
    from pipeline.searching.index_files import check_files, index_folder, read_manifest

    folder = index_folder(options.index)
    manifest = read_manifest(folder)
    check_files(folder, manifest, options.verify)
    if options.json:
        print(json.dumps(_facts(manifest), indent=1))
        return
    from pipeline.console import aligned

    print("\n".join(aligned([(key.replace("_", " "), str(value)) for key, value in _facts(manifest).items()])))
    if options.verify:
        print("all checksums are right")


def _facts(manifest: Any) -> dict[str, Any]:
    """What a user wants to know of an index."""
    engine = manifest.engine
    files = [record.bytes for segment in manifest.segments for record in segment.files.values()]
    files += [part.record.bytes for part in (engine, manifest.removed) if part is not None and part.record is not None]
    return {
        "images": manifest.rows,
        "removed": manifest.removed.rows if manifest.removed else 0,
        "dimensions": manifest.dim,
        "distance": manifest.distance,
        "model": manifest.model.source,
        "checkpoint": manifest.model.checkpoint or "the run's choice",
        "fingerprint": manifest.model.fingerprint,
        "engine": engine.name,
        "engine_parameters": engine.parameters,
        f"recall@{engine.k}": engine.recall,
        "engine_note": engine.note,
        "segments": len(manifest.segments),
        "changes": manifest.generation,
        "megabytes": round(sum(files) / 1e6, 1),
    }


_COMMANDS = {"build": _build, "query": _query, "add": _add, "remove": _remove, "info": _info}


def _open(options: argparse.Namespace) -> SearchIndex:
    """The index of the command, before PyTorch is loaded if there is none; its model is checked."""
    from pipeline.searching.index_files import check_files, index_folder, read_manifest

    folder = index_folder(options.index)
    check_files(folder, read_manifest(folder))
    from pipeline.searching.index import SearchIndex

    return SearchIndex(options.index, options.model)


def _threads(options: argparse.Namespace) -> int | None:
    if options.threads is not None and options.threads < 1:
        raise UserError(f"--threads is {options.threads}, expected 1 or more")
    return int(options.threads) if options.threads else os.cpu_count()


def _shown(batches: Iterable[IndexBatch], title: str) -> Iterator[IndexBatch]:
    """The batches, counted on a terminal while they pass."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from pipeline.console import console

    columns = (
        TextColumn("{task.description}", markup=False),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None)
        for batch in batches:
            yield batch
            bar.advance(task, len(batch.paths))


def _tell_rejected(embedding: Embedding) -> None:
    """Names the files that were left out, on stderr."""
    rejected = embedding.rejected
    if not rejected:
        return
    print(f"{len(rejected):,} files could not be read and were left out:", file=sys.stderr)
    for error in rejected[:_REJECTED_SHOWN]:
        print(f"  {error}", file=sys.stderr)
    if len(rejected) > _REJECTED_SHOWN:
        print("  ...", file=sys.stderr)


def _print_change(options: argparse.Namespace, change: Change, line: str) -> None:
    if options.json:
        done = {"added": change.added, "replaced": change.replaced, "removed": change.removed}
        print(json.dumps(done | {"index": _facts(change.manifest)}, indent=1))
        return
    engine = change.manifest.engine
    how = "exact search" if engine.name == "exact" else f"{engine.name}, recall@{engine.k} {engine.recall:.3f}"
    print(f"{line} ({change.manifest.rows:,} in the index; {how}{f'; {engine.note}' if engine.note else ''})")


if __name__ == "__main__":
    sys.exit(main())
