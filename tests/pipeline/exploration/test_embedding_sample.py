"""Which images a map shows, their places, and that both are the same each time."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from pipeline.errors import UserError
from pipeline.exploration.embedding_sample import EmbeddingSample, draw_sample
from pipeline.exploration.map_section import class_colours
from pipeline.exploration.projection import nearest, project


def clusters(num_classes: int, each: int, dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), each)
    return labels, (4 * random.normal(size=(num_classes, dim))[labels] + random.normal(size=(len(labels), dim))).astype(
        "f"
    )


def test_few_images_are_all_drawn_by_id() -> None:
    ids, rows = np.array([9, 2, 5]), np.array([[3, 4], [0, 2], [1, 0]], np.float32)
    sample = draw_sample(ids, np.array([0, 0, 1]), rows, "cosine")
    assert sample.ids.tolist() == [2, 5, 9] and sample.total == 3
    np.testing.assert_allclose(sample.embeddings, [[0, 1], [1, 0], [0.6, 0.8]], rtol=1e-6)
    assert (draw_sample(ids, np.array([0, 0, 1]), rows, "euclidean").embeddings == rows[[1, 2, 0]]).all()


def test_many_images_are_drawn_in_whole_classes() -> None:
    labels, rows = clusters(100, 10)
    sample = draw_sample(np.arange(1000), labels, rows, "euclidean", limit=305)
    assert len(sample.ids) == 300 and sample.total == 1000
    assert set(np.unique(labels[sample.ids], return_counts=True)[1]) == {10}
    assert (draw_sample(np.arange(1000), labels, rows, "euclidean", limit=305).ids == sample.ids).all()


def test_few_large_classes_share_the_map() -> None:
    labels = np.repeat([0, 1, -1], [500, 80, 300])  # two classes, and images of none
    sample = draw_sample(np.arange(880), labels, np.ones((880, 2), "f"), "euclidean", limit=300)
    assert dict(zip(*np.unique(labels[sample.ids], return_counts=True), strict=True)) == {0: 100, 1: 80, -1: 100}


def test_a_sample_is_read_back() -> None:
    labels, rows = clusters(3, 4)
    sample = draw_sample(np.arange(12), labels, rows, "cosine")
    read = EmbeddingSample.from_bytes(sample.to_bytes(), "x")
    assert (read.ids == sample.ids).all() and (read.embeddings == sample.embeddings).all()
    assert (read.total, read.distance) == (12, "cosine") and read.embeddings.dtype == np.float32
    with pytest.raises(UserError, match=r"run/test_embeddings\.npz is damaged"):
        EmbeddingSample.from_bytes(sample.to_bytes()[:200], "run/test_embeddings.npz")


@pytest.mark.parametrize("num", [0, 1, 2, 3, 4, 7])
def test_few_points_have_places(num: int) -> None:
    places = project(np.random.default_rng(0).normal(size=(num, 6)).astype("f"))
    assert places.shape == (num, 2) and ((places >= 0) & (places <= 1)).all()


@pytest.mark.parametrize(
    "rows",
    [np.ones((9, 4)), np.repeat(np.eye(3), 5, 0), np.arange(8.0)[:, None]],
    ids=["same", "copies", "one dimension"],
)
def test_degenerate_embeddings_have_places(rows: np.ndarray) -> None:
    places = project(rows.astype("f"))
    assert np.isfinite(places).all() and ((places >= 0) & (places <= 1)).all()


def test_a_map_keeps_clusters_together_and_is_the_same_each_time() -> None:
    labels, rows = clusters(6, 12)
    places = project(rows)
    assert places.tobytes() == project(rows).tobytes()
    assert (labels[nearest(places, 1)[:, 0]] == labels).mean() > 0.95
    assert np.ptp(places, axis=0).max() == pytest.approx(1, abs=1e-6)


def test_few_images_lie_by_their_principal_components() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 6)).astype("f") * np.array([9, 4, 1, 1, 1, 1], "f")
    components = PCA(2).fit_transform(rows.astype(float))
    places = project(rows)
    for axis in (0, 1):
        assert abs(np.corrcoef(places[:, axis], components[:, axis])[0, 1]) == pytest.approx(1, abs=1e-5)
    assert np.ptp(places, axis=0) == pytest.approx(
        np.ptp(components, axis=0) / np.ptp(components, axis=0).max(), abs=1e-5
    )


def test_neighbours_are_exact() -> None:
    rows = np.random.default_rng(1).normal(size=(40, 5)).astype("f")
    distances = ((rows[:, None].astype(float) - rows) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    assert (nearest(rows, 4) == np.argsort(distances, axis=1)[:, :4]).all()
    assert nearest(rows[:2], 3).tolist() == [[1, -1, -1], [0, -1, -1]]


def test_a_class_has_the_colour_of_its_middles_place() -> None:
    places = np.array([[1, 0.5], [0.9, 0.5], [0.5, 1], [0, 0.5], [0.5, 0.2], [0.5, 0.2]], np.float32)
    number = np.array(
        [0, 0, 1, 2, 3, 65535]
    )  # to the right, below, to the left, above (nearest to the middle); of no class
    hues, tones = class_colours(places, number, 4)
    assert hues == [90, 180, 270, 0]  # by angle: above, right, below, left
    assert tones.index(min(tones)) == 3 and sorted(tones) == [0.0, 0.333, 0.667, 1.0]
    assert class_colours(places, np.full(6, 65535), 0) == ([], [])
