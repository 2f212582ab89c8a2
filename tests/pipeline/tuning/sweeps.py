"""Sweeps over the tiny dataset, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline.data.store import Store
from pipeline.testing.tiny import tiny_values
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_file import load_sweep


def write_recipe(folder: Path, store: Store, name: str = "tiny", **changes: Any) -> str:
    """A recipe of the tiny dataset; returns its path."""
    values = tiny_values(str(folder), store.folder.uri, changes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def tiny_sweep(folder: Path, store: Store, *overrides: str, **changes: Any) -> SweepConfig:
    """A sweep of two methods, each a loss, in `folder`; 4 trials of each."""
    recipe = write_recipe(folder, store)
    values = {
        "storage": str(folder),
        "methods": {
            "triplet": {
                "recipe": recipe,
                "settings": {"method.loss": "TripletMarginLoss"},
                "space": {"method.loss_args.margin": {"uniform": [0.05, 0.3]}},
            },
            "contrastive": {"recipe": recipe, "settings": {"method.loss": "ContrastiveLoss"}},
        },
        "space": {"method.optimizer.lr": {"log_uniform": [1e-4, 1e-2]}},
        "budget": {"trials": 4},
        "final": {"seeds": [0, 1]},
        **changes,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_sweep(str(path), overrides)
