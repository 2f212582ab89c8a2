"""Population-based training: trials that do worse copy the weights and the setting of better ones, changed a little, and go on.

Jaderberg et al., Population Based Training of Neural Networks, 2017, as Ray Tune schedules it. A trial remains one ordinary run:
what it copies becomes the newest checkpoint of its run, and its config.yaml and changes.jsonl tell the new setting.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining

from pipeline.config import Config, differences, to_yaml
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import CHANGES, CONFIG, checkpoint_folder, read_changes, read_config
from pipeline.storage import Folder
from pipeline.tuning.space import Space

POINTER = "pointer.json"
SETTING = "population.json"  # in the run folder: the setting that it has copied last
FACTORS = (0.8, 1.25)
KEEP = 4  # checkpoints of a trial that others may copy


class Population(PopulationBasedTraining):
    """Ray Tune's scheduler for the trials of one method.

    Args:
        space: The search space; only ranges are changed while training, choices are copied.
        time, score: Keys of a result: share of the trial's length in percent, and the value to be maximised.
        interval: Percent of a trial's length between two copies.
        quantile: Share of the trials that copy, and that are copied from.
        seed: Seed of the changes.
    """

    def __init__(self, space: Space, time: str, score: str, interval: float, quantile: float, seed: int) -> None:
        super().__init__(
            time_attr=time, metric=score, mode="max", perturbation_interval=interval, quantile_fraction=quantile,
            custom_explore_fn=lambda config: config, log_config=False, require_attrs=False,
        )  # fmt: skip
        self.space = space
        self.random = random.Random(seed)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        # Ray Tune refuses every searcher here, also one that only hands out the first settings.
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)  # type: ignore[arg-type]

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        values = perturbed(self.space, trial_to_clone.config["values"], self.random)
        return {**trial.config, "values": values, "copied_from": trial_to_clone.config["number"]}, {}


def perturbed(space: Space, values: Mapping[str, Any], source: random.Random) -> dict[str, Any]:
    """A setting with every number of a range multiplied by 0.8 or 1.25, within the range; choices stay."""
    out = dict(values)
    for key, limits in space.distributions(values).items():
        low, high = getattr(limits, "low", None), getattr(limits, "high", None)
        key = space.names(values).get(key, key)
        if low is None or high is None or low == high:
            continue
        changed = values[key] * source.choice(FACTORS)
        if isinstance(low, int):
            changed = round(changed) if round(changed) != values[key] else values[key] + source.choice((-1, 1))
        step = getattr(limits, "step", None)
        changed = changed if step is None else low + round((changed - low) / step) * step
        changed = min(max(changed, low), high)
        # At an end of the range: the other way, so that a copy never equals its original.
        out[key] = changed if changed != values[key] else type(low)(low + (high - low) / 2)
    return out


def save_copy(run: Folder, number: int, to: str) -> None:
    """Copies the newest checkpoint of a run, and the best one that it refers to, into a local folder.

    Args:
        run: The run folder.
        number: Number of the trial.
        to: Local folder.
    """
    checkpoints = Checkpoints(run)
    step = checkpoints.steps()[-1]
    best = checkpoints.progress("checkpoints", step).best_step
    folders = [checkpoint_folder("checkpoints", step), *([checkpoint_folder("best", best)] if best >= 0 else [])]
    for name in folders:
        for file in (run / name).find():
            path = Path(to) / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((run / name).read(file))
    (Path(to) / POINTER).write_text(json.dumps({"number": number, "step": step, "folders": folders}))


def copied_from(folder: str) -> int:
    """Number of the trial whose copy lies in a folder."""
    return int(json.loads((Path(folder) / POINTER).read_text())["number"])


def adopt(config: Config, values: Mapping[str, Any], run: Folder, copy: str) -> None:
    """Makes another trial's checkpoint the newest one of a run, which goes on with another setting.

    Does nothing if the run has that setting already: it has copied before its process was lost.

    Args:
        config: The run's new configuration.
        values: Its setting, by dotted key.
        run: The run folder.
        copy: What `save_copy` wrote.
    """
    new, old = (c.model_dump(mode="json") for c in (config, read_config(run)))
    changes = differences(old, new, runtime=False)
    if not changes:
        return
    pointer = json.loads((Path(copy) / POINTER).read_text())
    for kind in ("checkpoints", "best"):
        run.remove(kind)
    for name in sorted(pointer["folders"]):  # the best one first: the newest checkpoint refers to it
        for path in sorted((Path(copy) / name).rglob("*"), key=lambda p: p.name == "checkpoint.json"):
            if path.is_file():
                run.write(f"{name}/{path.relative_to(Path(copy) / name).as_posix()}", path.read_bytes())
    line = {"step": pointer["step"], "changes": changes, "copied_from_trial": pointer["number"]}
    run.write(CHANGES, "".join(json.dumps(entry) + "\n" for entry in [*read_changes(run), line]).encode())
    run.write_json(SETTING, dict(values))
    run.write(CONFIG, to_yaml(config).encode())


def present_setting(run: Folder) -> dict[str, Any] | None:
    """The setting that a run has copied last; None if it never copied."""
    return dict(run.read_json(SETTING)) if run.exists(SETTING) else None
