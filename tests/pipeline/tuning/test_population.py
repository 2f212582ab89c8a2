"""Population-based training: what a copy changes, and how it becomes part of a run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from pipeline.config import Config, build_config, to_yaml
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import CONFIG, read_changes, run_folder
from pipeline.training.launch import run_in_process
from pipeline.tuning.population import FACTORS, adopt, copied_from, perturbed, present_setting, save_copy
from pipeline.tuning.space import Space

SPACE = Space(
    {
        "rate": {"log_uniform": [1e-4, 1e-2]},
        "size": {"int": [2, 9]},
        "share": {"uniform": [0, 1], "step": 0.1},
        "kind": ["a", "b"],
        "constant": 5,
    }
)


def test_numbers_change_and_stay_within_their_ranges() -> None:
    source = random.Random(0)
    values: dict[str, Any] = {"rate": 1e-3, "size": 4, "share": 0.5, "kind": "a", "constant": 5}
    for _ in range(200):
        new = perturbed(SPACE, values, source)
        SPACE.check_point({key: new[key] for key in ("rate", "size", "share", "kind")})
        assert new["kind"] == values["kind"] and new["constant"] == 5
        assert all(new[key] != values[key] for key in ("rate", "size")), "a copy never equals its original"
        values = new
    assert any(abs(perturbed(SPACE, {**values, "rate": 1e-3}, source)["rate"] / 1e-3 - f) < 1e-9 for f in FACTORS)


def test_a_run_adopts_another_ones_checkpoint(make_config: Callable[..., Config], tmp_path: Path) -> None:
    donor, copier = (make_config({"length": "2 epochs", "runtime.workers": 0}, name=n) for n in ("donor", "copier"))
    for config in (donor, copier):
        run_folder(config).write(CONFIG, b"")
    run_in_process(donor, donor.data.source, lambda state: None)
    other = copier.model_copy(update={"seed": 9})
    run_in_process(other, copier.data.source, lambda state: None)
    changed = build_config(
        {
            **copier.model_dump(),
            "method": {**copier.method.model_dump(), "optimizer": {"name": "adamw", "lr": 7e-4, "eps": 1e-6}},
        }
    )
    run = run_folder(copier)
    run.write(CONFIG, to_yaml(copier).encode())
    copy = tmp_path / "copy"
    copy.mkdir()
    save_copy(run_folder(donor), 4, str(copy))
    assert copied_from(str(copy)) == 4
    adopt(changed, {"method.optimizer.lr": 7e-4}, run, str(copy))
    steps = Checkpoints(run).steps()
    assert steps == Checkpoints(run_folder(donor)).steps()[-1:]
    name = f"checkpoints/step-{steps[-1]:08d}/trunk.safetensors"
    ours, theirs = (load_tensors(folder.read(name)) for folder in (run, run_folder(donor)))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert present_setting(run) == {"method.optimizer.lr": 7e-4}
    (line,) = read_changes(run)
    assert line["copied_from_trial"] == 4 and "method.optimizer.lr: 0.003 -> 0.0007" in line["changes"]
    adopt(changed, {"method.optimizer.lr": 7e-4}, run, str(copy))
    assert len(read_changes(run)) == 1, "it has copied already"

    longer = changed.model_copy(update={"length": type(changed.length)(value=3, unit="epochs")})
    run_in_process(longer, copier.data.source, lambda state: None)
    state = torch.load(
        run.path(f"checkpoints/step-{Checkpoints(run).steps()[-1]:08d}/optimizers.pt"), weights_only=True
    )
    assert state["optimizers"]["main"]["param_groups"][0]["initial_lr"] == 7e-4, "its own rate, not the copied one"
