"""Files for TensorBoard's embedding projector.

    projector_config.pbtxt  names the other files
    tensors.tsv             a row of numbers an image
    metadata.tsv            its class, name, file, split and sample id, below a line of headings
    sprite.png              pictures of all images in a square, row by row

`tensorboard --logdir FOLDER` shows them. The projector accepts sprites of at most 8192 by 8192 pixels.
"""

from __future__ import annotations

import io
import json
import math

import numpy as np

from pipeline.data.store import Store
from pipeline.exploration.embedding_sample import EmbeddingSample
from pipeline.exploration.pictures import each_image, tile, tile_grid
from pipeline.exploration.retrieved import labels_of
from pipeline.exploration.shown_names import shown_name
from pipeline.storage import Folder

CONFIG = "projector_config.pbtxt"
SPRITE_SIDE = 8192  # pixels, at most
TILE_SIDE = 64
COLUMNS = ("class", "name", "file", "split", "sample_id")


def write_projector(sample: EmbeddingSample, store: Store, name: str, folder: Folder) -> None:
    """Writes the files of a sample's images.

    Args:
        sample: The embeddings; one image at least.
        store: The dataset.
        name: How the projector calls them.
        folder: Files of an earlier call are replaced.

    Raises:
        RunError: A shard of the dataset is damaged.
        UserError: The folder cannot be written.
    """
    folder.check_writable()
    numbers = io.StringIO()
    np.savetxt(numbers, sample.embeddings, fmt="%.7g", delimiter="\t")
    folder.write("tensors.tsv", numbers.getvalue().encode())
    folder.write("metadata.tsv", _metadata(sample, store).encode())
    side = min(TILE_SIDE, SPRITE_SIDE // (math.isqrt(len(sample.ids) - 1) + 1))
    tiles = list(each_image(store, sample.ids, lambda image: tile(image, side), 2 * side))
    sprite = io.BytesIO()
    tile_grid(tiles)[0].save(sprite, "PNG")
    folder.write("sprite.png", sprite.getvalue())
    folder.write(CONFIG, _config(name, side).encode())


def _metadata(sample: EmbeddingSample, store: Store) -> str:
    rows = np.searchsorted(store.sample_id, sample.ids)
    classes = [store.class_name_of[label] if label >= 0 else "" for label in labels_of(sample.ids, store).tolist()]
    files = store.sources(sample.ids) or [""] * len(classes)
    columns = (classes, map(shown_name, classes), files, store.split[rows].tolist(), map(str, sample.ids.tolist()))
    lines = [COLUMNS, *zip(*columns, strict=True)]
    return "".join("\t".join(map(_cell, line)) + "\n" for line in lines)


def _cell(text: str) -> str:
    """The text without what ends a cell or a line."""
    return " ".join(text.replace("\t", " ").splitlines())


def _config(name: str, side: int) -> str:
    """The text form of TensorBoard's message ProjectorConfig."""
    return f"""embeddings {{
  tensor_name: {json.dumps(name, ensure_ascii=False)}
  tensor_path: "tensors.tsv"
  metadata_path: "metadata.tsv"
  sprite {{
    image_path: "sprite.png"
    single_image_dim: {side}
    single_image_dim: {side}
  }}
}}
"""
