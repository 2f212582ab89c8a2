"""The simulated datasets have the shape that is claimed of them, and a store opens them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.simulated import CLASSES, IMAGES, simulated_catalogue, simulated_labels, write_simulated_store
from pipeline.data.store import Store
from pipeline.storage import Folder


@pytest.mark.parametrize("samples", [IMAGES, 200_000])
def test_class_sizes_are_those_of_online_products(samples: int) -> None:
    labels = simulated_labels(samples)
    sizes = np.bincount(labels)
    assert len(labels) == samples and (np.diff(labels) >= 0).all() and labels.dtype == np.int64
    assert sizes.min() == 2 and sizes.max() == 12
    assert len(sizes) == round(samples * CLASSES / IMAGES)
    assert abs(sizes.mean() - IMAGES / CLASSES) < 1e-3
    assert np.array_equal(labels, simulated_labels(samples)), "seeded"


def test_a_simulated_store_is_selected_as_any_other(tmp_path: Path) -> None:
    labels = simulated_labels(5000)
    written = write_simulated_store(simulated_catalogue(labels), Folder(str(tmp_path)))
    store = Store(Folder(str(tmp_path)))
    assert written == (tmp_path / "catalog.parquet").stat().st_size
    selected = store.select(["train"], without_fold=0)
    kept = np.flatnonzero(labels % 4 != 0)
    assert np.array_equal(selected.ids, kept)
    assert selected.class_names == tuple(f"class-{c:08d}" for c in np.unique(labels[kept]))
    assert np.array_equal(np.unique(labels[kept])[selected.labels], labels[kept])
