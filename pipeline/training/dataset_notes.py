"""Lines on a dataset and an epoch that are worth knowing before a run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.config import Config
from pipeline.data.decoded import decoded_bytes, training_copy
from pipeline.data.store import Samples, Store

LONG_EPOCH = 1.5  # times the images, from which on the reason is told


def dataset_notes(config: Config, store: Store, samples: Samples) -> Iterator[str]:
    """What is worth knowing of a dataset before a run."""
    single_image_classes = np.flatnonzero(np.bincount(samples.labels) == 1)
    if len(single_image_classes):
        example = samples.class_names[single_image_classes[0]]
        yield f"{len(single_image_classes):,} training classes have one image each (first: {example}): used as negatives only"
    if config.cache.decoded:
        yield _note_on_decoded(config, store)
    num_bytes = training_copy(store, config.cache.max_bytes, config.cache.decoded)[1]
    if num_bytes > config.cache.max_bytes:
        yield (
            f"the training split has {num_bytes / 1e9:.1f} GB, cache.max_bytes allows {config.cache.max_bytes / 1e9:.1f}: "
            "images are read from the store in every epoch"
        )


def epoch_note(epoch_shape: tuple[int, int], samples: Samples) -> str:
    """The length of an epoch, and why it is long if it is."""
    steps, batch = epoch_shape
    repeats = steps * batch / len(samples)
    note = f"an epoch has {steps:,} steps of {batch} images, {repeats:,.1f} times the {len(samples):,} training images"
    if repeats <= LONG_EPOCH:
        return note
    sizes = np.bincount(samples.labels)
    return (
        f"{note}: the largest class has {sizes.max():,} of them, the median class {int(np.median(sizes[sizes > 0])):,}"
    )


def _note_on_decoded(config: Config, store: Store) -> str:
    """The room that decoded pixels take on a node, or why they are not kept."""
    num_bytes, max_bytes = decoded_bytes(store, "train"), config.cache.max_bytes
    if num_bytes is None:
        return (
            "cache.decoded has no effect: the dataset was prepared by an earlier version, which did not note how many pixels it "
            "has; prepare it again to keep decoded pixels"
        )
    if num_bytes > max_bytes:
        return (
            f"cache.decoded has no effect: the decoded training split takes {num_bytes / 1e9:.1f} GB, cache.max_bytes allows "
            f"{max_bytes / 1e9:.1f}; encoded images are kept instead"
        )
    return f"cache.decoded: each node keeps {num_bytes / 1e9:.2g} GB of decoded pixels in its cache folder"
