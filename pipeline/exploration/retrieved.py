"""The neighbours of every query, with the classes of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from pipeline.data.store import Store

MISSING = np.iinfo(np.int64).min  # label of a place that no neighbour takes


@dataclass(frozen=True)
class Retrieved:
    """Queries and what they find; labels are the store's, negative for images of no class.

    Attributes:
        query: Store ids.
        neighbours: Store ids, nearest first; -1 where the gallery is smaller than that.
        average_precision: Each query's term of MAP@R, or its average precision, 0 to 1.
        relevant: R, the number of gallery images of the query's class.
        query_labels, neighbour_labels: Their classes; MISSING where there is no neighbour.
    """

    query: Int64[np.ndarray, " queries"]
    neighbours: Int64[np.ndarray, "queries keep"]
    average_precision: Float64[np.ndarray, " queries"]
    relevant: Int64[np.ndarray, " queries"]
    query_labels: Int64[np.ndarray, " queries"]
    neighbour_labels: Int64[np.ndarray, "queries keep"]

    @staticmethod
    def of(columns: Mapping[str, np.ndarray], store: Store) -> Retrieved:
        """Adds the classes to the columns of a run's test_neighbours.npz.

        Raises:
            KeyError: An image is not in the store.
        """
        query, neighbours = columns["query"], columns["neighbours"]
        ids = np.append(query, neighbours)
        if not np.isin(ids[ids >= 0], store.sample_id).all():
            raise KeyError("an image is not in the store")
        places = np.searchsorted(
            store.sample_id, np.maximum(neighbours, store.sample_id[0] if len(store.sample_id) else 0)
        )
        return Retrieved(
            query, neighbours, columns["average_precision"], columns["relevant"],
            labels_of(query, store), np.where(neighbours >= 0, store.label[places], MISSING),
        )  # fmt: skip

    @property
    def counted(self) -> np.ndarray:
        """True for queries that have something to find."""
        return self.relevant > 0


def labels_of(ids: Int64[np.ndarray, " images"], store: Store) -> Int64[np.ndarray, " images"]:
    """The store's labels of images."""
    return store.label[np.searchsorted(store.sample_id, ids)]
