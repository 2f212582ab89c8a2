"""All sections about the images of a split: their map, their classes, and those that are training images as well."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from pipeline.data.store import Store
from pipeline.exploration.class_sections import class_sections, duplicate_section
from pipeline.exploration.duplicates import TRAIN_IMAGES, DuplicateSearch, find_duplicates, pixel_rows, small_pixels
from pipeline.exploration.embedding_sample import EmbeddingSample
from pipeline.exploration.map_section import MapSection, map_section
from pipeline.exploration.picture_book import PictureBook
from pipeline.exploration.pictures import each_image, make_sheet, tile, tile_side
from pipeline.exploration.retrieved import Retrieved


@dataclass(frozen=True)
class Sections:
    """Parts of a page.

    Attributes:
        map: The map; None where there are fewer than two images or no embeddings.
        classes: HTML of the sections about classes, empty where no query has anything to find.
        duplicates: HTML of the section about near-duplicates, empty where they were not looked for.
        search: What was found of them.
        train_book: Pictures of training images; the book that was given where they are of the same store.
    """

    map: MapSection | None
    classes: str
    duplicates: str
    search: DuplicateSearch | None
    train_book: PictureBook

    def css(self, book: PictureBook) -> str:
        """Rules for the map and for all pictures of the books."""
        rules = [self.map.css] if self.map else []
        rules += [each.css() for each in {id(b): b for b in (book, self.train_book)}.values()]
        return "".join(rules)

    @property
    def scripts(self) -> list[str]:
        return [self.map.script] if self.map else []


def compose(
    book: PictureBook,
    found: Retrieved | None,
    sample: EmbeddingSample | None,
    ids: Int64[np.ndarray, " images"],
    train: Store | None,
    what: str = "test images",
    max_train: int = TRAIN_IMAGES,
) -> Sections:
    """The sections; each image that is looked at is read once.

    Args:
        book: Collects the pictures of the store of the images.
        found: Their neighbours.
        sample: Their embeddings; None: no map.
        ids: Test images that are compared with the training images.
        train: Store of the training images; None: nothing is compared.
        what: What the images are, in words.
        max_train: Training images that are compared at most.

    Raises:
        RunError: A shard of the dataset is damaged.
    """
    store, drawn = book.store, None
    compared = train is not None and len(ids) > 0 and bool((train.split == "train").any())
    if sample is not None and len(sample.ids) > 1:
        side = tile_side(len(sample.ids))
        pairs = list(each_image(store, sample.ids, lambda image: (tile(image, side), small_pixels(image)), 2 * side))
        drawn = map_section(sample, make_sheet([picture for picture, _ in pairs]), store, what)
        pixels = np.stack([values for _, values in pairs])
    classes = class_sections(found, book) if found is not None else ""
    search, text, train_book = None, "", book
    if train is not None and compared:
        if drawn is None or sample is None or not np.array_equal(sample.ids, ids):
            pixels = pixel_rows(store, ids)
        search = find_duplicates(store, ids, pixels, train, max_train)
        if train.fingerprint != store.fingerprint:
            train_book = PictureBook(train, "t")
        text = duplicate_section(search, book, train_book)
    return Sections(drawn, classes, text, search, train_book)
