"""A long run under random faults: same weights as undisturbed, flat memory, nothing left behind.

    python -m benchmarks.soak [--minutes 60] [--every 120] [--calm 20] [--seed 0] [--root FOLDER] [--json PATH]

Trains a small mined run (hard negatives and a cross-batch memory; two workers and two mining servers on Ray) for the given time, then
stops it as `raydml stop` does. Every so many seconds one process is killed or stopped at random: a worker, a mining server, Ray Train's
controller, a process that loads images, or a worker that hangs (SIGSTOP). After the given time it trains on without faults for a while
(`--calm`), since workers that live for minutes do not tell how their memory grows. Then the same run is trained undisturbed in one process
to the same step, which takes half as long again, and the weights are compared.

Memory is the resident memory of each process but for what it shares with others (Ray's objects), sampled every second from a minute on
after training was first seen in it, of a worker from seven minutes on: so long its allocator and Ray's buffers fill. Its growth is the
slope of a line through the means of each 20 s of all processes of a kind, each process with a level of its own, with Student's 95 %
interval.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import scipy.stats
import torch
from safetensors.torch import load as load_tensors

from benchmarks.sweep import left_behind
from benchmarks.table import Row, finish
from pipeline.config import Config, build_config
from pipeline.distributed.ray_session import ray_session
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import run_folder
from pipeline.runs.run_state import read_run_state, request_stop
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values, write_tiny_store
from pipeline.training.launch import run_in_process
from pipeline.training.ray_train import run_on_ray

TITLES = {  # part of a process's title
    "worker": "RayTrainWorker",
    "mining server": "MiningActor",
    "controller": "TrainController",
    "loader": "ray::MapBatches",
    "hanging worker": "RayTrainWorker",
}
WARM_UP_S = {"driver": 60.0, "worker": 420.0, "mining server": 60.0}
MEAN_OVER_S = 20.0  # a worker lives for some minutes
HANG_S = 20.0  # the run's hang_timeout_s
GROWTH_MIB_H = 64.0  # by which memory may grow in an hour, at most, at the upper end of the interval
ENDLESS_STEPS = 10**6


def processes(title: str) -> list[psutil.Process]:
    """The processes below this one whose title contains a text."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Memory(threading.Thread):
    """Samples the resident memory of the driver, the workers and the mining servers once a second, while the run trains.

    Attributes:
        training: True while it does; a process that is being started, and grows, is not sampled.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.training = False
        self._trained_since: dict[int, float] = {}
        self.samples: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))

    def run(self) -> None:
        kinds = {"worker": TITLES["worker"], "mining server": TITLES["mining server"]}
        while not self.ended.wait(1.0):
            if not self.training:
                continue
            self._sample("driver", psutil.Process())
            for kind, title in kinds.items():
                for process in processes(title):
                    self._sample(kind, process)

    def _sample(self, kind: str, process: psutil.Process) -> None:
        try:
            memory = process.memory_info()
        except psutil.Error:
            return
        now = time.monotonic()
        age = now - self._trained_since.setdefault(process.pid, now)
        if age >= WARM_UP_S[kind]:
            self.samples[kind][process.pid].append((age / 3600, (memory.rss - memory.shared) / 2**20))

    def slope(self, kind: str) -> tuple[float, float, int]:
        """MiB an hour, half of its 95 % interval, and the number of processes."""
        times, sizes, units = list[float](), list[float](), 0
        for points in self.samples[kind].values():
            parts = defaultdict(list)
            for hour, mib in points:
                parts[int(hour * 3600 / MEAN_OVER_S)].append((hour, mib))
            means = np.array([np.mean(group, axis=0) for group in parts.values()])
            if len(means) > 1:
                units += 1
                times += list(means[:, 0] - means[:, 0].mean())
                sizes += list(means[:, 1] - means[:, 1].mean())
        degrees = len(times) - units - 1
        if degrees < 1:
            return float("nan"), float("nan"), units
        t, m = np.array(times), np.array(sizes)
        slope = float(t @ m / (t @ t))
        error = float(np.sqrt(((m - slope * t) ** 2).sum() / degrees / (t @ t)))
        return slope, float(scipy.stats.t.ppf(0.975, degrees)) * error, units


class Faults(threading.Thread):
    """Kills or stops a random process every so many seconds while the run trains.

    Attributes:
        done: Number of faults of each kind.
    """

    def __init__(self, every_s: float, seed: int) -> None:
        super().__init__(daemon=True)
        self.every_s, self.random = every_s, random.Random(seed)
        self.ended = threading.Event()
        self.done: dict[str, int] = dict.fromkeys(TITLES, 0)
        self.training = False

    def run(self) -> None:
        while not self.ended.wait(self.every_s):
            kind = min(TITLES, key=lambda name: (self.done[name], self.random.random()))
            self._hit(kind)

    def _hit(self, kind: str) -> None:
        """Looks for a process of the kind until there is one; loaders come and go."""
        while not self.ended.is_set():
            victims = processes(TITLES[kind]) if self.training else []
            if victims:
                number = signal.SIGSTOP if kind == "hanging worker" else signal.SIGKILL
                try:
                    os.kill(self.random.choice(victims).pid, number)
                except ProcessLookupError:
                    continue
                self.done[kind] += 1
                print(f"fault: {kind}", file=sys.stderr)
                return
            time.sleep(0.01)


def config_of(root: str, store: str, steps: int, **runtime: Any) -> Config:
    changes = {
        "name": "soak", "length": f"{steps} steps", "method.hard_negatives": 3, "method.memory": 30, "mining.shards": 2,
        "checkpoint.every": "20 steps", "evaluation.every": "400 steps", "method.optimizer.name": "sgd", "method.optimizer.lr": 1e-3,
        "runtime.workers": 2, "runtime.loader": "ray", "runtime.max_failures": 10**6, "runtime.hang_timeout_s": HANG_S,
        "runtime.log_every": 50,
    }  # fmt: skip
    return build_config(
        tiny_values(root, store, changes | {f"runtime.{name}": value for name, value in runtime.items()})
    )


def weights(config: Config) -> dict[str, torch.Tensor]:
    run = run_folder(config)
    folder = f"checkpoints/step-{Checkpoints(run).steps()[-1]:08d}"
    parts = {name: load_tensors(run.read(f"{folder}/{name}.safetensors")) for name in ("trunk", "method")}
    return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of a tensor, relative to its size."""
    assert one.keys() == other.keys()
    pairs = ((one[name].double(), other[name].double()) for name in one)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs)


def silent(_: dict[str, Any]) -> None: ...


def unfinished_files(root: Path) -> Iterator[str]:
    for path in root.rglob("*"):
        if path.is_file() and (path.suffix in (".part", ".tmp") or ".tmp-" in path.name):
            yield str(path.relative_to(root))


def stop_the_run(run: Folder, faults: Faults, memory: Memory) -> None:
    """Ends faults and samples, and asks the run to save and to end, until a start of it has heard."""
    faults.ended.set()
    memory.ended.set()
    while (state := read_run_state(run)) is not None and state.state == "running":
        request_stop(run, state.start, state.token)
        time.sleep(5)


def names_of_actors(ray: Any) -> list[str]:
    """Classes of the actors that are not dead."""
    return sorted(a["ActorClassName"] for a in ray._private.state.actors().values() if a["State"] != "DEAD")


def soak(root: str, minutes: float, every_s: float, calm_minutes: float, seed: int) -> list[Row]:
    store = write_tiny_store(Path(root)).folder.uri
    shared_before, descriptors = set(os.listdir("/dev/shm")), psutil.Process().num_fds()
    memory, faults = Memory(), Faults(every_s, seed)
    with ray_session(8) as ray:
        config = config_of(f"{root}/soak", store, ENDLESS_STEPS)
        messages: list[str] = []

        def follow(state: dict[str, Any]) -> None:
            messages.extend(state["messages"])
            faults.training = memory.training = state["progress"].get("phase") == "training"
            for text in state["messages"]:
                print(text, file=sys.stderr)

        memory.start()
        faults.start()
        start = time.monotonic()
        calm = threading.Timer(60 * minutes, faults.ended.set)
        stopper = threading.Timer(60 * (minutes + calm_minutes), stop_the_run, (run_folder(config), faults, memory))
        calm.start()
        stopper.start()
        try:
            run_on_ray(config, store, follow, ray)
        finally:
            calm.cancel()
            stopper.cancel()
            faults.ended.set()
            memory.ended.set()
        wall = time.monotonic() - start
        faults.join()
        actors, groups = left_behind(ray)
        print(f"actors left: {', '.join(names_of_actors(ray)) or 'none'}", file=sys.stderr)
    steps = Checkpoints(run_folder(config)).steps()[-1]
    time.sleep(5)
    left = [process for title in set(TITLES.values()) for process in processes(title)]
    whole = config_of(f"{root}/whole", store, steps, workers=0, loader="in_process")
    run_in_process(whole, store, silent)
    difference = largest_difference(weights(config), weights(whole))
    resumed = sum("resumed at step" in text for text in messages)
    shared = set(os.listdir("/dev/shm")) - shared_before
    total = sum(faults.done.values())
    rows = [
        Row(f"minutes of a run of {steps:,} steps under faults", wall / 60),
        *(Row(f"  faults: {kind}", count) for kind, count in faults.done.items()),
        Row("  starts of the workers from a checkpoint", resumed),
        Row("  largest difference of a tensor to the undisturbed run", difference, promised="<= 1e-9", ok=difference <= 1e-9 and total > 0),
    ]  # fmt: skip
    for kind in ("driver", "worker", "mining server"):
        slope, half, units = memory.slope(kind)
        ok = units > 0 and slope + half <= GROWTH_MIB_H
        rows += [
            Row(f"  MiB an hour, {kind} ({units} processes)", slope, promised=f"<= {GROWTH_MIB_H:g}", ok=ok),
            Row("    half of its 95 % interval", half),
        ]
    for what, count in (
        ("actors", actors), ("placement groups", groups), ("processes", len(left)), ("shared-memory objects", len(shared)),
        ("half-written files", len(list(unfinished_files(Path(root) / "soak")))),
    ):  # fmt: skip
        rows.append(Row(f"  {what} left", count, promised="0", ok=not count))
    rows.append(Row("  open files of the driver, after / before", psutil.Process().num_fds(), descriptors))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="how long the disturbed run takes")
    parser.add_argument("--every", type=float, default=120, metavar="SECONDS", help="time between two faults")
    parser.add_argument("--calm", type=float, default=20, metavar="MINUTES", help="time without faults after them")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults")
    parser.add_argument("--root", help="keep the runs in this folder, which has to be empty")
    parser.add_argument("--json", metavar="PATH", help="write the figures into this file as well")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="raydml-soak-") as temporary:
        root = os.path.abspath(options.root or temporary)
        os.makedirs(root, exist_ok=True)
        rows = soak(root, options.minutes, options.every, options.calm, options.seed)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
