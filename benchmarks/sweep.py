"""What a sweep reaches and what it costs beside training: the quick one, eight trials of a minute, hundreds of trials.

    python -m benchmarks.sweep [--only quick cost many] [--steps 57] [--trials 500] [--root FOLDER] [--json PATH]

quick   `raydml tune emoji_quick`: time, trials that were stopped early or lost, and the best trial beside the default recipe that
        was trained on as many images
cost    wall time x trials at once, beside the time of training steps and validations, of eight trials of a minute in steps; the
        rest is Ray's start, the trials' starts, checkpoints and the answer. A run by itself has its validations too, so they are
        not the sweep's; the ratio to the steps alone stands below
many    trials that train nothing, by the same code: the driver's memory, what is left behind, seconds a trial

25 minutes on two cores: quick 8, cost 8, many 9.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.table import Row, finish
from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.distributed.ray_session import ray_session
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values, write_tiny_store
from pipeline.tuning.driver import run_sweep
from pipeline.tuning.sweep_file import build_sweep, load_sweep
from pipeline.tuning.sweep_folder import SweepFolder, TrialRecord, sweep_folder
from pipeline.tuning.trial import Trial, TrialRunner

QUICK_S, QUICK_TRIALS = 600, 8
COST = 0.20  # of the time in training steps and validations
GROWTH = 1.10  # of the driver's memory, from a fifth of the trials to the last
RAYS_OWN = ("_AutoscalingCoordinatorActor", "TrainStateActor", "_StatsActor")  # actors of Ray, one a cluster
LEFT_S = 10.0  # within which everything has to be given back


def command(module: str, *arguments: str) -> float:
    """Runs a command, which has to succeed; its wall time in seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=sys.stderr)
    return time.perf_counter() - start


def overrides(*values: str) -> list[str]:
    return [text for value in values for text in ("--set", value)]


def read(root: str, name: str) -> list[TrialRecord]:
    return SweepFolder(sweep_folder(root, name)).read()


# ---- quick -----------------------------------------------------------------------------------------------------------


def quick(root: str) -> list[Row]:
    wall = command("pipeline.tune", "emoji_quick", *overrides(f"storage={root}"))
    records = read(root, "emoji_quick")
    searched = [record for record in records if record.stage == "search"]
    stopped = sum(record.state == "stopped" for record in searched)
    lost = sum(record.state in ("failed", "running") for record in records)
    best = max(searched, key=lambda record: record.score or 0.0)
    default, images = train_default(root)
    score = round(best.score or 0.0, 4)  # as summary.json has it
    return [
        Row("emoji_quick, wall s", wall, promised=f"<= {QUICK_S}", ok=wall <= QUICK_S),
        Row("  trials", len(searched), promised=f">= {QUICK_TRIALS}", ok=len(searched) >= QUICK_TRIALS),
        Row("  of them stopped early", stopped, promised=">= 1", ok=stopped > 0),
        Row("  trials and final runs lost", lost, promised="0", ok=not lost),
        Row("  best map@r / default recipe's", score, default, score / default, "ratio >= 1", score >= default),
        Row("  images of the best / default", best.images, images, best.images / images, "ratio <= 1", best.images <= images),
    ]  # fmt: skip


def train_default(root: str) -> tuple[float, int]:
    """MAP@R on the validation classes, and images, of the recipe that the quick sweep starts from, with the sweep's settings."""
    sweep = load_sweep("emoji_quick")
    recipe = next(iter(sweep.methods.values())).recipe
    settings = Path(root) / "default.yaml"
    settings.write_text(yaml.safe_dump({"preset": recipe, **sweep.settings}))
    changed = overrides(
        f"storage={root}",
        "name=default",
        "evaluation.test=false",
        "data.validation_fold=0",
        "evaluation.checkpoint=best",
    )
    command("pipeline.train", str(settings), *changed)
    summary = Folder(root).read_json("runs/default/summary.json")
    return summary["validation"][sweep.metric], summary["images"]


# ---- cost ------------------------------------------------------------------------------------------------------------


def cost(root: str, steps: int) -> list[Row]:
    command("pipeline.train", "baseline/emoji", *overrides(f"storage={root}", "name=prepares", "length=1 steps"))
    cores = os.cpu_count() or 1
    values = {
        "name": "cost",
        "storage": root,
        "methods": {"multi_similarity": {"recipe": "baseline/emoji"}},
        "settings": {
            "data": {"transforms": {"size": 64, "evaluation_scale": 1}},
            "length": f"{steps} steps",
            "evaluation": {"every": f"{-(-steps // 2)} steps"},
            "runtime": {"workers": 1, "cpus_per_worker": 1, "loader": "in_process"},
        },
        "space": {"method.optimizer.lr": {"log_uniform": [2e-4, 1.5e-3]}},
        "scheduler": {"name": "none"},
        "budget": {"trials": 8},
        "trials_at_once": min(2, cores),
        "final": None,
    }
    path = Path(root) / "cost.yaml"
    path.write_text(yaml.safe_dump(values))
    begun = time.time()
    wall = command("pipeline.tune", str(path))
    return cost_rows(read(root, "cost"), begun, wall, min(2, cores))


def cost_rows(records: Sequence[TrialRecord], begun: float, wall: float, slots: int) -> list[Row]:
    """Where the time of a sweep went.

    Args:
        records: Its trials.
        begun: When its command started, seconds since 1970.
        wall: Wall time of the command, seconds.
        slots: Trials at once.
    """
    runs = [run for record in records for run in record.runs]
    steps, validations = sum(run.seconds for run in runs), sum(run.validation_s for run in runs)
    training = steps + validations
    busy = sum(record.busy_s for record in records)
    share = slots * wall / training - 1
    first, last = min(record.started_at for record in records), max(record.ended_at for record in records)
    return [
        Row(f"{slots} x wall s of {len(records)} trials / s in steps and validations", slots * wall, training, share + 1, f"ratio <= {1 + COST:g}", share <= COST),
        Row("  the same / s in steps alone", slots * wall, steps, slots * wall / steps),
        Row("  s in steps of a trial", steps / len(records)),
        Row("  s in validations of a trial", validations / len(records)),
        Row("  s before the first trial", first - begun),
        Row("  s of a trial beside both", (busy - training) / len(records)),
        Row("  s between two trials", (slots * (last - first) - busy) / len(records)),
        Row("  s after the last trial", begun + wall - last),
    ]  # fmt: skip


# ---- many ------------------------------------------------------------------------------------------------------------


class StubTrial(Trial):
    """A trial that trains nothing: four validations of a made-up objective."""

    def run_one(self, config: Config, store: Store, runner: TrialRunner) -> None:
        rate = config.method.optimizer.lr
        for quarter in range(1, 5):
            value = 40 * (1 - 0.5**quarter) - 1000 * abs(rate - 3e-3)
            point = {
                "step": quarter,
                "epoch": quarter / 4,
                "images": 100 * quarter,
                "map@r": value,
                "recall@1": value + 20,
            }
            runner.add_validation(point)
            if runner.stop_requested.is_set():
                return


class Watch(threading.Thread):
    """Follows the driver's memory and what its trials hold, by the number of trials that have begun.

    Attributes:
        memory: Resident bytes of this process, by number of trials.
        most_actors, most_groups: Largest numbers alive at once.
    """

    def __init__(self, ray: Any, trials: Folder) -> None:
        super().__init__(daemon=True)
        self.ray, self.trials, self.ended = ray, trials, threading.Event()
        self.memory: dict[int, int] = {}
        self.most_actors = self.most_groups = 0

    def run(self) -> None:
        process = psutil.Process()
        while not self.ended.wait(1.0):
            self.memory[len(self.trials.names("trials"))] = process.memory_info().rss
            actors, groups = alive(self.ray)
            self.most_actors, self.most_groups = max(actors, self.most_actors), max(groups, self.most_groups)


def alive(ray: Any) -> tuple[int, int]:
    """Numbers of actors and placement groups that hold something."""
    actors = [actor for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]
    own = [actor for actor in actors if actor["ActorClassName"] not in RAYS_OWN]
    groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    return len(own), len(groups)


def left_behind(ray: Any) -> tuple[int, int]:
    """Actors and placement groups that are still there after some seconds."""
    deadline = time.monotonic() + LEFT_S
    while (left := alive(ray)) != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def many(root: str, trials: int) -> list[Row]:
    store = write_tiny_store(Path(root))
    recipe = Path(root) / "tiny.yaml"
    changes = {"length": "1 epochs", "runtime.workers": 1, "evaluation.test": False, "evaluation.every": "0.25 epochs"}
    recipe.write_text(yaml.safe_dump(tiny_values(root, store.folder.uri, changes)))
    sweep = build_sweep({
        "name": "many", "storage": root, "methods": {"stub": {"recipe": str(recipe)}}, "budget": {"trials": trials},
        "space": {"method.optimizer.lr": {"log_uniform": [1e-4, 1e-1]}}, "final": None, "trials_at_once": 2,
    })  # fmt: skip
    with ray_session(2) as ray:
        watch = Watch(ray, sweep_folder(root, "many"))
        watch.start()
        start = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_SELF)
        result = run_sweep(sweep, trainable=StubTrial)
        seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_SELF)
        watch.ended.set()
        actors, groups = left_behind(ray)
    lost = trials - sum(record.state in ("finished", "stopped") for record in result.records)
    early, late = (watch.memory[min(watch.memory, key=lambda n: abs(n - at))] / 2**20 for at in (trials // 5, trials))
    cpu = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime
    return [
        Row(f"{trials} trials without work, s a trial", seconds / trials),
        Row("  CPU s of the driver a trial", cpu / trials),
        Row("  trials lost", lost, promised="0", ok=not lost),
        Row("  driver's MiB at the last / at a fifth", late, early, late / early, f"ratio <= {GROWTH:g}", late / early <= GROWTH),
        Row("  most actors at once", watch.most_actors),
        Row("  most placement groups at once", watch.most_groups),
        Row("  actors left", actors, promised="0", ok=not actors),
        Row("  placement groups left", groups, promised="0", ok=not groups),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("quick", "cost", "many"), default=["quick", "cost", "many"])
    parser.add_argument(
        "--steps", type=int, default=76, help="cost: steps of a trial (57 are an epoch; 76 about a minute)"
    )
    parser.add_argument("--trials", type=int, default=500, help="many: number of trials")
    parser.add_argument("--root", help="keep the sweeps in this folder, which has to be empty")
    parser.add_argument("--json", metavar="PATH", help="write the figures into this file as well")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="raydml-bench-") as temporary:
        root = os.path.abspath(options.root or temporary)
        os.makedirs(root, exist_ok=True)
        if "quick" in options.only:
            rows += quick(root)
        if "cost" in options.only:
            rows += cost(root, options.steps)
        if "many" in options.only:
            rows += many(root, options.trials)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
