"""Runs on a cluster of this machine with two labelled nodes: `python -m tests.cluster.labelled_nodes RECIPE OUTPUT`.

A process of its own, as the cluster is none of the tests' shared one. The head has room for nothing; nodes "left" and "right" have the
label `side`. Trains the recipe with workers on one side, loaders and mining servers on the other, then with the sides exchanged; starts it
by its command with labels that no node has; then a sweep of one trial. Writes as JSON on which sides each part has run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

import numpy as np
import ray
import torch
import yaml
from ray.cluster_utils import Cluster
from torch import Tensor

from pipeline import train
from pipeline.config import build_config
from pipeline.data.store import Store
from pipeline.distributed.ray_session import ray_session
from pipeline.storage import Folder
from pipeline.training.ray_train import run_on_ray
from pipeline.tuning.driver import run_sweep
from tests.pipeline.tuning.sweeps import tiny_sweep

LIMIT_S = 900.0
SIDES = ("left", "right")
KEYS = ("runtime.worker_labels", "runtime.loader_labels", "mining.labels")
SEEN = "RAYDML_TEST_SEEN"  # folder for the files of `noting`


def noting(image: Tensor, size: int, random: np.random.Generator) -> Tensor:
    """A transform that leaves a file of the name of the node on which a task of Ray Data runs it; actors and the driver check it too."""
    if ray.is_initialized():
        context = ray.get_runtime_context()
        if context.worker.mode == ray.WORKER_MODE and context.get_actor_id() is None:
            Path(os.environ[SEEN], context.get_node_id()).touch()
    return torch.full((3, size, size), int(random.integers(256)), dtype=torch.uint8)


class Places:
    """The sides on which actors of some classes, and the noting transform, have been seen."""

    def __init__(self, seen: Path) -> None:
        self.side = {node["NodeID"]: node["Labels"].get("side", "head") for node in ray.nodes()}
        self.seen = seen
        self.earlier = {a["ActorID"] for a in ray._private.state.actors().values()}

    def found(self) -> dict[str, list[str]]:
        actors = [a for a in ray._private.state.actors().values() if a["ActorID"] not in self.earlier]
        # The last is what Ray Tune makes of class Trial.
        named = {"worker": "RayTrainWorker", "server": "MiningActor", "trial": "ResourceTrainable"}
        places = {
            part: sorted({self.side[a["Address"]["NodeID"]] for a in actors if a["ActorClassName"].endswith(name)})
            for part, name in named.items()
        }
        loaders = sorted({self.side[path.name] for path in self.seen.iterdir()})
        for path in self.seen.iterdir():
            path.unlink()
        return {**places, "loader": loaders}


def with_labels(recipe: dict[str, Any], name: str, labels: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The recipe under another name and with these labels, by dotted key."""
    values = json.loads(json.dumps(recipe)) | {"name": name}
    for key, wanted in labels.items():
        section, _, last = key.partition(".")
        values.setdefault(section, {})[last] = wanted
    return values


def main(recipe: str, output: str) -> None:
    limit = threading.Timer(LIMIT_S, os._exit, [3])
    limit.daemon = True
    limit.start()
    seen = Path(output).with_suffix(".seen")
    seen.mkdir()
    os.environ[SEEN] = str(seen)
    small = {"object_store_memory": 10**8}
    head = {"num_cpus": 0, "include_dashboard": False, **small}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for side in SIDES:
        cluster.add_node(num_cpus=4, labels={"side": side}, **small)
    os.environ["RAY_ADDRESS"] = cluster.address
    values = yaml.safe_load(Path(recipe).read_text())
    found: dict[str, Any] = {}
    with ray_session(1):
        for here, there in (SIDES, SIDES[::-1]):
            places = Places(seen)
            labels = {key: {"side": there} for key in KEYS} | {"runtime.worker_labels": {"side": here}}
            config = build_config(with_labels(values, here, labels))
            run_on_ray(config, config.data.source, lambda _: None, ray)
            found[here] = places.found()
        places = Places(seen)
        for key in KEYS:
            path = Path(recipe).with_name("nowhere.yaml")
            path.write_text(yaml.safe_dump(with_labels(values, "nowhere", {key: {"side": "middle"}})))
            error = io.StringIO()
            with contextlib.redirect_stderr(error):
                status = train.main([str(path)])
            found[key] = [status, error.getvalue()]
        found["nowhere"] = places.found()
        places = Places(seen)
        settings = {"runtime": {"workers": 1, "cpus_per_worker": 1, "worker_labels": {"side": "right"}}}
        sweep = tiny_sweep(
            Path(recipe).parent, Store(Folder(values["data"]["source"])), settings=settings | {"length": "1 epochs"},
            searcher={"name": "random"}, scheduler={"name": "none"}, budget={"trials": 1}, final=None, trials_at_once=2,
        )  # fmt: skip
        found["trials"] = sorted(record.state for record in run_sweep(sweep).records)
        found["sweep"] = places.found()
    Path(output).write_text(json.dumps(found))
    os._exit(0)  # its nodes end with it: a shutdown in order takes half a minute


if __name__ == "__main__":
    main(*sys.argv[1:])
