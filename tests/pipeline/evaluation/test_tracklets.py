"""Video, end to end: OSM+CAA trained on tracklets, persons found again by another camera, tracklets pooled over ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from methods import Batch
from methods.osm_caa import OsmCaa
from pipeline import train
from pipeline.config import Config, ModelConfig
from pipeline.data.entries import DISTRACTOR, Entry
from pipeline.data.layouts import LAYOUTS
from pipeline.data.loader import ImageSource
from pipeline.data.store import Samples, Store
from pipeline.data.transforms import TransformConfig
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.evaluate_task import evaluate
from pipeline.evaluation.reid import ReidSet, match
from pipeline.evaluation.reranking import Reranking
from pipeline.evaluation.tasks import RetrievalTask, retrieval_units, validation_task
from pipeline.evaluation.tasks import test_task as task_of
from pipeline.evaluation.tracklets import pool_tracks
from pipeline.model.trunk import build_trunk
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values, write_images
from pipeline.testing.watched_run import FixedRanks
from tests.pipeline import shipped
from tests.pipeline.conftest import Cli
from tests.pool import Pool
from tests.stubs import tiny_config

FRAMES = (2, 5, 3, 4)  # of a person's four tracklets, by cameras 1, 2, 1, 2


def write_video(root: Path) -> Store:
    """12 persons train; 8 others are asked for by their first tracklet; a distractor and junk stand beside them."""
    images = write_images(root / "images", {f"p{i:02d}": sum(FRAMES) for i in range(22)}, seed=1)
    entries = []
    for number, (path, person) in enumerate(images):
        at = number % sum(FRAMES)
        tracklet = int(np.searchsorted(np.cumsum(FRAMES), at, side="right"))
        who = number // sum(FRAMES)
        split = "train" if who < 12 else "query" if tracklet == 0 and who < 20 else "gallery"
        kind: Any = {20: "distractor", 21: "junk"}.get(who)
        entries.append(
            Entry(path, person, split, track=f"{person}-{tracklet}", camera=1 + tracklet % 2, frame=at, kind=kind)
        )
    return write_store("video", entries, Folder(root / "store"), run_serially, num_folds=3, protocol="reid")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_video(tmp_path_factory.mktemp("video"))


CHANGES = {
    "method.name": "osm_caa",
    "method.frames": 3,
    "method.samples_per_class": 6,
    "method.classes_per_batch": 2,
    "method.embedding_dim": 8,
    "evaluation.metric": "map",
    "evaluation.recall_at": [1, 5],
    "evaluation.clustering": False,
    "length": "2 epochs",
}


def start(video: Store, tmp_path: Path, changes: dict[str, Any]) -> int:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_values(str(tmp_path), video.folder.uri, CHANGES | changes)))
    return train.main([str(recipe)])


def test_a_run_on_tracklets(video: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(video, tmp_path, {}) == 0
    run = tmp_path / "runs" / "tiny"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 8 and all(line["tracklet_cross_entropy"] > 0 for line in steps), "8 persons train, 2 in a step"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["final"]) == {"map", "map_trapezoidal", "cmc@1", "cmc@5", "queries", "queries_without_positive"}
    assert (summary["final"]["queries"], summary["final"]["queries_without_positive"]) == (8, 0)
    validations = [line for line in lines if line["kind"] == "validation"]
    assert [line["queries"] for line in validations] == [16, 16], "each of 4 persons' tracklets asks"
    neighbours = np.load(run / "test_neighbours.npz")
    assert len(neighbours["query"]) == 8 and (neighbours["relevant"] == 2).all()
    shown = video.track[np.searchsorted(video.sample_id, neighbours["neighbours"][:, 0])]
    assert len(set(shown.tolist())) > 1
    report = (run / "report.html").read_text()
    assert "CMC@1" in report and "mAP" in report


def test_what_is_measured_is_the_pooled_tracklets(video: Store) -> None:
    """Against the steps by hand, for both tasks, with distractors as either, with and without re-ranking."""
    embedder, trunk = make_embedder(video, FixedRanks(0, 1, (1,)))
    found = []
    for changes in ({}, {"evaluation.distractors": "junk"}, {"evaluation.reranking": {"k1": 6, "k2": 2}}):
        config = config_of(video, changes)
        task = task_of(config, video)
        assert task is not None and task.reid and task.gallery is not None
        assert len(retrieval_units(task.queries)) == 8 and len(retrieval_units(task.gallery)) == 40, (
            "the gallery has the queries"
        )
        result = evaluate(task, embedder, trunk, None, (1, 5))
        sides = []
        for side in (task.queries, task.gallery):
            tracks, rows = pool_tracks(embedder(side.ids, trunk, None), side.tracks)
            first = np.array([np.flatnonzero(side.tracks == t)[0] for t in tracks])
            sides.append(ReidSet(rows, torch.from_numpy(side.labels[first]), torch.from_numpy(side.cameras[first])))
        r = config.evaluation.reranking
        again = None if r is None else Reranking.of(*(s.embeddings for s in sides), k1=r.k1, k2=r.k2, weight=r.weight)
        expected = match(*sides, distractors=config.evaluation.distractors, reranking=again)
        assert result.metrics == pytest.approx(expected.summary((1, 5)), abs=1e-9)
        assert np.array_equal(result.retrieval.neighbours, expected.neighbours)
        found.append(result.retrieval.neighbours)
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    fold = validation_task(config_of(video), video)
    assert fold is not None and fold.reid and len(retrieval_units(fold.queries)) == 16
    assert evaluate(fold, embedder, trunk, None, (1,)).metrics["queries"] == 16


def config_of(video: Store, changes: dict[str, Any] | None = None) -> Config:
    return tiny_config("/nowhere", video.folder.uri, CHANGES | (changes or {}))


def make_embedder(video: Store, ranks: Any) -> tuple[Embedder, Any]:
    torch.manual_seed(0)
    trunk = build_trunk(ModelConfig(backbone="test_efficientnet", weights="none"), 24).double()
    source = ImageSource(video.folder.uri, video.fingerprint, None, TransformConfig(size=24))
    return Embedder(source, "in_process", 1, 16, "float64", torch.device("cpu"), ranks), trunk


def measure(rank: int, world: int, shares: tuple[int, ...], uri: str) -> tuple[dict[str, Any], Tensor]:
    video = Store(Folder(uri))
    embedder, trunk = make_embedder(video, FixedRanks(rank, world, shares))
    config = config_of(video, {"evaluation.reranking": {"k1": 3, "k2": 2}})
    task = task_of(config, video)
    assert task is not None and task.gallery is not None
    result = evaluate(task, embedder, trunk, None, (1, 5))
    return result.metrics, embedder.embed_tracklets(task.gallery.ids, task.gallery.tracks, trunk, None)


@pytest.mark.cluster
def test_tracklets_are_pooled_over_ranks(pool: Pool, video: Store) -> None:
    """Shares cut tracklets in two; one rank has no frame at all."""
    ((expected, rows),) = pool(measure, 1, (1,), video.folder.uri)
    for shares in ((7, 5), (5, 4, 3), (12, 0)):
        for metrics, pooled in pool(measure, len(shares), shares, video.folder.uri):
            assert metrics == expected
            torch.testing.assert_close(pooled, rows, rtol=0, atol=1e-12)


# ---- MARS, as its authors ship it -------------------------------------------------------------------------------------

PUBLISHED = LAYOUTS["mars"]  # with its own counts, which `cli` replaces
MARS = {  # person, camera, frames; 7 persons train, person 8 is seen by one camera only
    "train": [(person, 1 + (person + i) % 6, 4 + (3 * person + 5 * i) % 11)
              for person in (1, 3, 5, 7, 9, 11, 13) for i in range(2 + person % 3 // 2)],
    "test": [(-1, 1, 3), (0, 2, 4), (0, 5, 2), (2, 1, 3), (2, 2, 5), (2, 4, 2), (4, 1, 2), (4, 5, 11), (4, 1, 3),
             (6, 3, 4), (6, 6, 1), (8, 2, 3)],
}  # fmt: skip
ASKED = [4, 5, 7, 10, 12]  # rows of the test tracklets, from 1
RELEVANT = [2, 2, 1, 1, 0]  # tracklets of the person by another camera


def test_mars_from_its_files_to_its_figures(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 3 identities × 2 tracklets × 9 frames, as in the paper; a part of the dataset, and said to be one."""
    shipped.mars(tmp_path / "in", MARS, ASKED)
    zips = [shipped.pack(tmp_path / "in", tmp_path / f"{name}.zip", [name]) for name in ("bbox_train", "bbox_test")]
    monkeypatch.setitem(LAYOUTS, "mars", PUBLISHED)
    status, said = cli("mars", "--from", *zips, tmp_path / "in" / "info", "--partial", "--folds", "2")
    assert status == 0, said
    store = Store(Folder(tmp_path / "home" / "data" / "mars"))
    lengths = {side: [frames for _, _, frames in tracks] for side, tracks in MARS.items()}
    lacks = (
        f"train: {sum(lengths['train'])} of 509,914 images, 7 of 625 classes, {len(lengths['train'])} of 8,298 tracks",
        "query: 4 of 626 classes, 5 of 1,980 tracks",
        f"query+gallery: {sum(lengths['test'])} of 681,089 images, 4 of 634 classes, 12 of 12,180 tracks",
    )
    assert store.partial == lacks

    trained: list[np.ndarray] = []
    step = OsmCaa.training_step

    def watched(self: OsmCaa, batch: Batch, context: Any) -> dict[str, float]:
        trained.append(batch.ids.numpy())
        return step(self, batch, context)

    monkeypatch.setattr(OsmCaa, "training_step", watched)
    batches = {"method.frames": 9, "method.samples_per_class": 18, "method.classes_per_batch": 3}
    chosen = {"protocol": "paper", "data.validation_fold": None, "evaluation.metric": "cmc@1"}
    assert start(store, tmp_path, batches | chosen) == 0

    samples = store.select(["train"])
    assert samples.tracks is not None and samples.frames is not None
    ids = np.stack(trained).reshape(4, 3, 2, 9)  # 2 epochs of 2 steps: the 7th identity fills no batch
    people, tracks = samples.labels[ids], samples.tracks[ids]
    assert (people == people[..., :1, :1]).all() and (tracks == tracks[..., :1]).all()
    for epoch in people[..., 0, 0].reshape(2, 6):
        assert len(set(epoch.tolist())) == 6
    for track, drawn in zip(tracks[..., 0].ravel(), samples.frames[ids].reshape(-1, 9), strict=True):
        assert len(set(drawn.tolist())) == min(9, int((samples.tracks == track).sum()))

    run = tmp_path / "runs" / "tiny"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 4 and all(line["cross_entropy"] > 0 < line["tracklet_cross_entropy"] for line in steps)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["step"], summary["images"]) == (4, 4 * 54)
    assert summary["protocol"]["partial"] == "; ".join(lacks) and "PARTIAL" in summary["protocol"]["dataset"]
    assert "Partial dataset" in (run / "report.html").read_text()

    final = summary["final"]
    assert (final["queries"], final["queries_without_positive"]) == (4, 1)
    assert 0 < final["map_trapezoidal"] <= final["map"] <= 100 and 0 <= final["cmc@1"] <= final["cmc@5"] <= 100
    found = np.load(run / "test_neighbours.npz")
    query, nearest, relevant = found["query"], found["neighbours"][:, 0], found["relevant"]
    assert relevant.tolist() == RELEVANT
    asked, shown = (store.label[np.searchsorted(store.sample_id, i)] for i in (query, nearest))
    assert (shown >= DISTRACTOR).all(), "junk is not ranked"
    assert final["cmc@1"] == 100 * (asked == shown)[relevant > 0].mean()
    assert final["map"] == pytest.approx(100 * found["average_precision"][relevant > 0].mean(), abs=1e-4)


# ---- bad input, before anything is trained ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation.metric": "map@r"}, "evaluation.metric is 'map@r', expected one of map, map_trapezoidal, cmc@1, cmc@5"),
        ({"method.classes_per_batch": 9}, "batches of 9 identities, but the training set has 8"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_first(
    video: Store, tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert start(video, tmp_path, changes) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("*.safetensors"))


def test_images_are_no_tracklets(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert start(store, tmp_path, {"evaluation.metric": "map@r"}) == 2
    assert "frames is 3, but the dataset has no tracklets: set frames to 1" in capsys.readouterr().err


def test_queries_that_no_other_camera_has_seen() -> None:
    def samples(cameras: list[int]) -> Samples:
        count = len(cameras)
        return Samples(np.arange(count), np.arange(count) // 2, ("a", "b"), np.arange(count), np.array(cameras))

    RetrievalTask(samples([1, 1, 1, 2]), samples([1, 1, 1, 2]), reid=True).check(cluster=False)
    alone = samples([1, 1, 2, 2])
    with pytest.raises(ValueError, match="none of the 4 queries has another person seen by another camera to find"):
        RetrievalTask(alone, alone, reid=True).check(cluster=False)
    strangers = replace(samples([2, 2, 1, 1]), labels=np.array([-1, -1, -2, -2]))
    with pytest.raises(ValueError, match="none of the 4 queries"):
        RetrievalTask(alone, strangers, reid=True).check(cluster=False)
