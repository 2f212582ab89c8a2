"""Embeddings of the images that a map shows: of all, or of a sample of whole classes; kept with a run."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from jaxtyping import Float32, Int64

from pipeline.errors import UserError

MAX_IMAGES = 8_000  # more take minutes to lay out, and a page of many megabytes
FEWEST_OF_CLASS = 20  # images of a class that is drawn, or all that it has


@dataclass(frozen=True)
class EmbeddingSample:
    """Some images with their embeddings.

    Attributes:
        ids: Store ids, ascending; of a tracklet its first frame.
        embeddings: One row an image; of length one where the distance is cosine.
        total: Number of images that they were drawn from.
        distance: What nearest means.
    """

    ids: Int64[np.ndarray, " images"]
    embeddings: Float32[np.ndarray, "images dim"]
    total: int
    distance: Literal["cosine", "euclidean"]

    def to_bytes(self) -> bytes:
        """The sample as an .npz file."""
        buffer = io.BytesIO()
        np.savez(buffer, ids=self.ids, embeddings=self.embeddings, total=self.total, distance=self.distance)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes, path: str) -> EmbeddingSample:
        """Reads `to_bytes` back.

        Raises:
            UserError: The file is damaged; `path` is named.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                distance = cast(Literal["cosine", "euclidean"], str(file["distance"]))
                return EmbeddingSample(file["ids"], file["embeddings"], int(file["total"]), distance)
        except Exception as error:  # zipfile, zlib and numpy each have their own
            raise UserError(
                f"{path} is damaged ({error}): remove it, and `raydml explore RUN` makes the map from the images"
            ) from error


def draw_sample(
    ids: Int64[np.ndarray, " images"],
    labels: Int64[np.ndarray, " images"],
    embeddings: Float32[np.ndarray, "images dim"],
    distance: Literal["cosine", "euclidean"],
    limit: int = MAX_IMAGES,
) -> EmbeddingSample:
    """All images, or at most `limit` of them in whole classes, drawn with a fixed seed.

    A class gives at most its share of `limit`, but 20 images at least; classes are drawn in random order until no further
    one fits. Images of no class (negative labels) count as one.
    """
    rows = np.argsort(ids, kind="stable")
    if len(ids) > limit:
        rows = rows[np.sort(_draw(labels[rows], limit))]
    chosen = np.ascontiguousarray(embeddings[rows], np.float32)
    if distance == "cosine":
        chosen = chosen / np.linalg.norm(chosen, axis=1, keepdims=True)
    return EmbeddingSample(ids[rows], chosen, len(ids), distance)


def _draw(labels: np.ndarray, limit: int) -> np.ndarray:
    random = np.random.default_rng(0)
    shuffled = random.permutation(len(labels))
    grouped = shuffled[np.argsort(labels[shuffled], kind="stable")]
    classes, starts = np.unique(labels[grouped], return_index=True)
    most = max(FEWEST_OF_CLASS, limit // len(classes))
    members = [part[:most] for part in np.split(grouped, starts[1:])]
    chosen, room = [], limit
    for index in random.permutation(len(classes)):
        if len(members[index]) <= room:
            chosen.append(members[index])
            room -= len(members[index])
    return np.concatenate(chosen)
