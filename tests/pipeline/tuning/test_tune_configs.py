"""The shipped sweep files: each is loaded, checked to the end on a small dataset of the right name, and dry-run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.data.entries import Entry
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.storage import Folder
from pipeline.testing.tiny import write_images
from pipeline.tuning.dry_run import dry_run
from pipeline.tuning.shipped import sweep_file_names, sweep_file_title
from pipeline.tuning.sweep_file import dump_sweep, load_sweep

NAMES = sweep_file_names()
DATASETS = ("cub", "cars", "sop", "inshop")
TRAIN_CLASSES, TEST_CLASSES = 64, 6


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a small dataset of each name: 64 training classes in 4 folds."""
    root = tmp_path_factory.mktemp("storage")
    train = {f"train{i:02d}": 2 + i % 4 for i in range(TRAIN_CLASSES)}
    test = {f"test{i:02d}": 4 for i in range(TEST_CLASSES)}
    images = write_images(root / "images", train | test, seed=0, side=8)
    for dataset in DATASETS:
        splits = ["query", "gallery"] if dataset == "inshop" else ["test"]
        entries = [
            Entry(path, name, "train" if name in train else splits[i % len(splits)])
            for i, (path, name) in enumerate(images)
        ]
        write_store(dataset, entries, Folder(root / "data" / dataset), run_serially, num_folds=4, images_per_shard=500)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_checked_and_dry_run(name: str, storage: Path) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    sweep = load_sweep(name, [f"storage={storage}"])
    plan = dry_run(sweep, 100.0, console)
    text = console.export_text()
    assert sweep.name == name and all(label in text for label in sweep.methods)
    assert plan.trials is not None and plan.trials >= len(sweep.methods)
    if not name.startswith("emoji"):  # the demo is prepared when the sweep starts
        images, hours = plan.images(), plan.hours()
        assert images is not None and hours is not None and f"images: {images:,}" in text
    assert load_sweep(name, [f"storage={storage}"]) == sweep and dump_sweep(sweep)


def test_there_is_one_for_each_method_and_dataset() -> None:
    methods = ("osm_caa", "intra_batch", "gca_hng", "mmsi", "smart_mining", "baselines")
    each = {f"{method}_{dataset}" for method in methods for dataset in DATASETS}
    assert set(NAMES) == each | {"emoji_quick", "reality_check", "sop_large", "paper_cub"}
    titles = {name: sweep_file_title(name) for name in NAMES}
    assert len(set(titles.values())) == len(NAMES) and all(5 < len(title) < 140 for title in titles.values()), titles


def test_the_large_sweep_is_large_and_survives_spot_nodes() -> None:
    sweep = load_sweep("sop_large")
    assert len(sweep.methods) * (sweep.budget.trials or 0) >= 400 and sweep.retries >= 10
    assert sweep.scheduler.name == "asha" and sweep.settings["mining"]["resource"] == "mining"


def test_the_reality_check_is_its_protocol() -> None:
    sweep = load_sweep("reality_check")
    assert {"osm_caa", "intra_batch", "gca_hng", "mmsi", "smart_mining", "contrastive", "triplet"} <= set(sweep.methods)
    assert (sweep.folds, sweep.budget.trials, sweep.metric) == ([0, 1, 2, 3], 50, "map@r")
    assert sweep.final is not None and sweep.final.classes == "folds" and len(sweep.final.seeds) >= 5


def test_the_quick_sweep_tries_the_demos_own_recipe_first() -> None:
    sweep = load_sweep("emoji_quick")
    point = sweep.methods["multi_similarity"].points[0]
    assert point == {
        "method.loss_args.base": 0.5,
        "method.optimizer.lr": 5e-4,
        "method.optimizer.head_lr_multiplier": 10,
    }  # of baseline/emoji
    assert (sweep.budget.trials or 0) * len(sweep.methods) >= 8
