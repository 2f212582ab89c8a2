"""The pictures of a page: every image is put in once, however often it is shown."""

from __future__ import annotations

from html import escape

import numpy as np

from pipeline.data.store import Store
from pipeline.exploration.pictures import thumbnail_rules
from pipeline.exploration.retrieved import labels_of
from pipeline.exploration.shown_names import shown_name

SMALL = 64  # pixels, longer side


class PictureBook:
    """Pictures of one store's images.

    Args:
        store: The images.
        prefix: Of the CSS classes; another store on the same page needs another one.
    """

    def __init__(self, store: Store, prefix: str = "s") -> None:
        self.store, self.prefix = store, prefix
        self.side_of: dict[int, int] = {}

    def add(self, sample: int, side: int) -> None:
        """Has an image on the page, with `side` pixels at least."""
        self.side_of[sample] = max(side, self.side_of.get(sample, 0))

    def picture(self, sample: int, verdict: str = "") -> str:
        """A small picture as HTML; its class and its file are told by pointing at it."""
        self.add(sample, SMALL)
        name = escape(self.name_of(sample))
        return (
            f'<span class="thumb small {verdict} {self.prefix}{sample}" role="img" aria-label="{name}" '
            f'title="{name}{escape(self._file_of(sample))}"></span>'
        )

    def name_of(self, sample: int) -> str:
        """The shown name of an image's class."""
        return self.class_name(self.label_of(sample))

    def class_name(self, label: int) -> str:
        """The shown name of a class; images of no class have a negative label."""
        return shown_name(self.store.class_name_of[label]) if label >= 0 else "no class"

    def label_of(self, sample: int) -> int:
        """The store's label of an image."""
        return int(labels_of(np.array([sample]), self.store)[0])

    def _file_of(self, sample: int) -> str:
        paths = self.store.sources(np.array([sample]))
        return f" ({'/'.join(paths[0].split('/')[-2:])})" if paths else ""

    def css(self) -> str:
        """The rules that hold the pictures; reads those images of the store.

        Raises:
            RunError: A shard of the dataset is damaged.
        """
        return thumbnail_rules(self.side_of, self.store, self.prefix)
