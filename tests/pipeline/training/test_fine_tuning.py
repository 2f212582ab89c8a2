"""The presets that fine-tune a Vision Transformer: with a small one of the same kind they train, and their parts act."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.data.store import Store
from pipeline.recipes import load_config
from pipeline.runs.checkpoint import TRAINING, Checkpoints
from pipeline.runs.run_folder import run_folder
from pipeline.testing.watched_run import make_worker
from pipeline.training.checks import checked_trunk


@pytest.mark.parametrize("preset", ["baseline/cub_vit", "baseline/inshop_dinov2"])
def test_a_preset_trains(preset: str, store: Store, tmp_path: Path) -> None:
    small = {
        "storage": str(tmp_path), "data.source": store.folder.uri, "model.backbone": "test_vit", "model.weights": "none",
        "data.transforms.size": 32, "data.transforms.resize": 32, "method.classes_per_batch": 3, "runtime.images_per_pass": 5,
        "length": "4 steps", "model.head_first": "2 steps", "evaluation.every": "4 steps", "checkpoint.every": "4 steps",
        "evaluation.recall_at": [1], "runtime.loader": "in_process", "runtime.workers": 0,
        "method.optimizer.schedule.warmup": "1 steps",
    }  # fmt: skip
    if "dinov2" in preset:
        small |= {"model.trainable": "last 2 blocks", "model.thaw_after": "3 steps"}
    config = load_config(preset, [f"{key}={value}" for key, value in small.items()])
    worker = make_worker(config, 0, (1,))
    before = {name: p.detach().clone() for name, p in worker.trunk.named_parameters()}
    moved: list[set[str]] = []
    step = worker.context.step

    def watched(optimizer: str) -> None:
        step(optimizer)
        moved.append({name for name, p in worker.trunk.named_parameters() if not torch.equal(p, before[name])})

    worker.context.step = watched  # type: ignore[method-assign]
    worker()
    stages = [len(names) for names in moved]
    assert stages[:2] == [0, 0] and 0 < stages[2] and len(moved) == 4
    if "dinov2" in preset:
        assert stages[2] < stages[3] and not any("patch_embed" in name for name in moved[2])
    rates = {group["name"]: group["initial_lr"] for group in reversed(worker.context.optimizers["main"].inner.param_groups)}
    assert rates["head"] == pytest.approx(10 * config.method.optimizer.lr) and rates["trunk"] < config.method.optimizer.lr
    checkpoints = Checkpoints(run_folder(config))
    assert TRAINING in checkpoints.checksums("checkpoints", 4)


@pytest.mark.parametrize("preset", ["baseline/sop_vit", "baseline/cars_dinov2"])
def test_a_preset_s_network_can_be_made(preset: str) -> None:
    trunk = checked_trunk(load_config(preset, ["model.weights=none"]))
    assert trunk.features == 384
