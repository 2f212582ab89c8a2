"""What a dry run prints: trials, runs, images, resources and hours; nothing is started or written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.storage import Folder
from pipeline.training.checks import check_run
from pipeline.tuning.dry_run import DryRun, dry_run, least_share
from pipeline.tuning.run_configs import run_configs
from pipeline.tuning.sweep_config import SchedulerConfig, SweepConfig
from tests.pipeline.tuning.sweeps import tiny_sweep


def printed(sweep: SweepConfig, speed: float | None = None) -> tuple[DryRun, str]:
    console = Console(width=100, record=True, file=io.StringIO())
    plan = dry_run(sweep, speed, console)
    return plan, console.export_text()


def images_of(configs: list[Config], store: Store) -> int:
    shapes = [check_run(config, store).epoch_shape for config in configs]
    return sum(3 * shape[0] * shape[1] for shape in shapes if shape is not None)  # epochs, steps and images


def test_the_numbers_of_a_sweep(tmp_path: Path, store: Store) -> None:
    sweep = tiny_sweep(tmp_path, store, "folds=[0, 1]", "seeds=[0, 1, 2]", "trials_at_once=2", "scheduler.name=none")
    before = sorted(Folder(str(tmp_path)).find())
    plan, text = printed(sweep, 50.0)
    assert sorted(Folder(str(tmp_path)).find()) == before
    search, final = (work for work in plan.work if work.method == "triplet")
    assert (search.trials, search.runs, final.trials, final.runs) == (4, 6, 2, 1)
    assert search.trial_images == images_of(run_configs(sweep, "triplet", {}, 0, "search"), store)
    assert final.trial_images == images_of(run_configs(sweep, "triplet", {}, 0, "final", seed=0), store)
    total = 2 * (4 * search.trial_images + 2 * final.trial_images)
    assert plan.images() == total and plan.trials == 12
    assert plan.hours() == pytest.approx(total / 50 / 2 / 3600)
    assert f"images: {total:,}\n" in text and "trials at once: 2" in text
    assert "one trial (triplet, contrastive): 1 worker, 1 CPU" in text
    assert "at 50 images per second and trial (as given)" in text


def test_halving_shortens_the_search() -> None:
    asha = SchedulerConfig(name="asha", grace=0.25, reduction=2)
    assert least_share(asha) == pytest.approx(0.25 + 0.25 / 2 + 0.5 / 4)
    assert least_share(SchedulerConfig(name="asha", grace=1)) == 1
    assert least_share(SchedulerConfig(name="median", grace=0.3)) == 0.3
    assert least_share(SchedulerConfig(name="pbt")) == least_share(SchedulerConfig(name="none")) == 1


def test_asha_and_a_speed_of_earlier_runs(tmp_path: Path, store: Store) -> None:
    sweep = tiny_sweep(tmp_path, store)
    plan, text = printed(sweep)
    assert plan.hours() is None and "give the speed of one trial by --images-per-second" in text
    least, most = plan.images(least=True), plan.images()
    assert least is not None and most is not None and least < most
    assert f"images: {most:,}, at least {least:,} where trials are stopped early" in text
    from pipeline.runs.summary import protocol

    config = run_configs(sweep, "triplet", {}, 0, "search")[0]
    for name, speed in [("a", 30.0), ("b", 50.0), ("c", 40.0)]:
        summary = {"images_per_second": speed, "protocol": protocol(config, store)}
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "summary.json").write_text(json.dumps(summary))
    other = {"images_per_second": 1.0, "protocol": {**protocol(config, store), "backbone": "resnet50"}}
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "summary.json").write_text(json.dumps(other))
    plan, text = printed(sweep)
    assert plan.speed == 40 and "(median of 3 finished runs of triplet)" in text


def test_hours_alone_and_a_dataset_that_is_not_prepared(tmp_path: Path, store: Store) -> None:
    plan, text = printed(tiny_sweep(tmp_path, store, "budget={hours: 2}"), 10.0)
    assert plan.trials is None and plan.images() is None and "hours at most 2" in text
    demo = SweepConfig.model_validate(
        {
            "storage": str(tmp_path),
            "methods": {"m": {"recipe": "baseline/emoji"}},
            "space": {"method.optimizer.lr": [1e-4, 1e-3]},
            "budget": {"trials": 2},
        }
    )
    plan, text = printed(demo, 10.0)
    assert plan.trials == 7 and "images: not known before the dataset is prepared" in text


def test_a_sweep_that_cannot_be_trained(tmp_path: Path, store: Store) -> None:
    with pytest.raises(UserError, match="folds: got 9"):
        printed(tiny_sweep(tmp_path, store, "folds=[9]"))
    with pytest.raises(UserError, match="--images-per-second is 0, expected more than 0"):
        printed(tiny_sweep(tmp_path, store), 0.0)
