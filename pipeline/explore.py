"""`python -m pipeline.explore RUN`: a page with a map of a split's images and the classes that fail; TensorBoard's projector.

    python -m pipeline.explore emoji                           the test images: RUN_FOLDER/explore-test.html
    python -m pipeline.explore emoji --split train             the training images (validation, all)
    python -m pipeline.explore emoji --data birds --to b.html  the test images of another prepared dataset
    python -m pipeline.explore emoji --tensorboard FOLDER      writes the files of TensorBoard's projector as well

The page is one file that needs no network: a map of the embeddings (of at most 8,000 images, in whole classes), the worst
classes, the pairs of classes that are confused, labels in doubt, and test images that are also training images. It takes the
time of an evaluation and up to a minute more. The run may have been trained by an earlier version, or still be going on.
"""

from __future__ import annotations

import argparse
import os
import sys
from html import escape
from typing import TYPE_CHECKING

from pipeline.errors import RunError, UserError, fail

if TYPE_CHECKING:
    from pipeline.data.store import Store
    from pipeline.exploration.embedding_sample import EmbeddingSample
    from pipeline.inference.measure import Measurement

PROG = "python -m pipeline.explore"
SPLITS = ("test", "train", "validation", "all")
IMAGES = {"test": "test images", "train": "training images", "validation": "validation images", "all": "images"}
NEWLINE = "\n"
TRAIN_IMAGES = 50_000  # compared with the test images; some minutes for photographs


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run's name, folder or s3:// URI")
    parser.add_argument(
        "--split", choices=SPLITS, help="which images (default: test; validation if the run is not finished)"
    )
    parser.add_argument("--checkpoint", help="best, last, or a step (default: the run's evaluation.checkpoint)")
    parser.add_argument(
        "--data",
        metavar="DATASET",
        help="another dataset: a name below STORAGE/data, or the folder or s3:// URI of a store",
    )
    parser.add_argument("--to", metavar="PATH.html", help="the page (default: explore-SPLIT.html in the run's folder)")
    parser.add_argument(
        "--tensorboard", metavar="FOLDER", help="write tensors, metadata and pictures for TensorBoard's projector here"
    )
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 written, 2 bad input or a failed evaluation, 130 interrupted."""
    options = build_parser(prog).parse_args(arguments)
    try:
        explore(options)
    except (UserError, RunError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again", file=sys.stderr)
        return 130
    return 0


def explore(options: argparse.Namespace) -> None:
    """Writes the page, and the projector's files where they are asked for.

    Raises:
        UserError: There is no such run, checkpoint or dataset, it has no such images, or something cannot be written.
        RunError: The embeddings cannot be measured, or a shard of the dataset is damaged.
    """
    if options.data and options.split == "validation":
        raise UserError("--data has no validation fold of the run: leave out --split validation")
    from pipeline.runs.records import find_run
    from pipeline.storage import Folder

    run = find_run(options.run)  # before PyTorch is loaded
    parent, name = os.path.split(options.to) if options.to else (run.uri, "")
    if options.to and not name.endswith((".html", ".htm")):
        raise UserError(f"--to {options.to}: expected the name of a page, such as out.html")
    target = Folder(parent or ".")
    projector = Folder(options.tensorboard) if options.tensorboard else None
    for folder in (target, projector):
        if folder is not None:
            folder.check_writable()
    from pipeline.exploration.embedding_sample import draw_sample
    from pipeline.exploration.projector import write_projector
    from pipeline.inference.measure import measure

    print("embedding and searching ...", file=sys.stderr)
    found = measure(run.uri, options.checkpoint, options.split, data=options.data, dims=())
    sample = draw_sample(*found.result.embedded.each_once(), found.distance)
    name = name or f"explore-{found.split}{f'-{found.store.name}' if options.data else ''}.html"
    print(f"drawing {len(sample.ids):,} of {sample.total:,} images ...", file=sys.stderr)
    target.write(name, explored_page(found, sample))
    print(f"page: {target}/{name}")
    if projector is not None:
        write_projector(sample, found.store, f"{found.trained.config.name} {found.split}", projector)
        print(f"projector: tensorboard --logdir {projector}")


def explored_page(found: Measurement, sample: EmbeddingSample) -> bytes:
    """The page about the images of a measurement.

    Raises:
        RunError: A shard of the dataset is damaged.
    """
    from pipeline.exploration.compose import compose
    from pipeline.exploration.duplicates import sample_row_groups
    from pipeline.exploration.embedding_sample import MAX_IMAGES
    from pipeline.exploration.html_page import html_page
    from pipeline.exploration.picture_book import PictureBook
    from pipeline.exploration.retrieved import Retrieved
    from pipeline.metric_names import COUNTS, metric_title
    from pipeline.runs.report_page import page_css

    store, what = found.store, IMAGES[found.split]
    book = PictureBook(store)
    test_ids = store.sample_id[store.split != "train"]
    ids = sample.ids if found.split == "test" else sample_row_groups(test_ids, MAX_IMAGES, store.row_group)
    retrieved = Retrieved.of(found.result.neighbour_columns(), store)
    sections = compose(book, retrieved, sample, ids, _training_images(found), what, TRAIN_IMAGES)
    metrics = found.result.metrics
    figures = ", ".join(f"{escape(metric_title(k))} {v:.1f} %" for k, v in metrics.items() if k not in COUNTS)
    notes = [found.title, *found.notes, f"protocol: {found.protocol}", *found.partial]
    name = found.trained.config.name
    body = [
        f"""<header>
<p class="eyebrow">raydml · deep metric learning · {escape(what)} of a run</p>
<h1>{escape(name)}</h1>
<p class="key">{metrics["queries"]:,.0f} queries: {figures}</p>
{"".join(f'<p class="note">{escape(note)}</p>{NEWLINE}' for note in notes)}</header>""",
        sections.map.html if sections.map else "<p>One image alone has no map.</p>",
        sections.classes,
        sections.duplicates,
    ]
    title = f"{name}, {what}"
    return html_page(title, page_css() + sections.css(book), "\n".join(body), sections.scripts)


def _training_images(found: Measurement) -> Store | None:
    """The dataset that the run was trained on; None if it cannot be opened any more and the page is of another one."""
    if found.store.fingerprint == found.trained.fingerprint:
        return found.store
    try:
        return found.trained.store()
    except UserError as error:
        print(f"not compared with the training images: {error}", file=sys.stderr)
        return None


if __name__ == "__main__":
    sys.exit(main())
