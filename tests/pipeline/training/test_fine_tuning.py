"""The presets that fine-tune a Vision Transformer: with a small one of the same kind they train, and their parts act."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config import build_config
from pipeline.data.store import Store
from pipeline.recipes import load_config
from pipeline.runs.checkpoint import TRAINING, Checkpoints
from pipeline.runs.run_folder import run_folder
from pipeline.testing.tiny import tiny_values
from pipeline.testing.watched_run import make_worker, state
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
    assert stages[:2] == [0, 0] and stages[2] > 0 and len(moved) == 4
    if "dinov2" in preset:
        assert stages[2] < stages[3] and not any("patch_embed" in name for name in moved[2])
    rates = {
        group["name"]: group["initial_lr"] for group in reversed(worker.context.optimizers["main"].inner.param_groups)
    }
    assert (
        rates["head"] == pytest.approx(10 * config.method.optimizer.lr) and rates["trunk"] < config.method.optimizer.lr
    )
    checkpoints = Checkpoints(run_folder(config))
    assert TRAINING in checkpoints.checksums("checkpoints", 4)


@pytest.mark.slow
def test_a_compiled_backbone_trains_the_same(store: Store, tmp_path: Path) -> None:
    """To float32's rounding; the names of its weights stay, and its checkpoint is one of any other run."""
    left = []
    for compiled in (False, True):
        changes = {
            "name": f"compiled-{compiled}", "length": "3 steps", "precision": "float32", "model.compile": compiled,
            "method.optimizer.name": "sgd", "method.optimizer.lr": 0.1,
        }  # fmt: skip
        worker = make_worker(build_config(tiny_values(str(tmp_path), store.folder.uri, changes)), 0, (1,))
        worker()
        left.append(state(worker))
    assert left[0].keys() == left[1].keys()
    for name, value in left[0].items():
        torch.testing.assert_close(left[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("preset", ["baseline/sop_vit", "baseline/cars_dinov2"])
def test_a_preset_s_network_can_be_made(preset: str) -> None:
    trunk = checked_trunk(load_config(preset, ["model.weights=none"]))
    assert trunk.features == 384
