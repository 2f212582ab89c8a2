"""Records what the program of today leaves behind, for the programs of later to open: `python -m tests.compat.record`.

    stores/birds, shop, video   datasets of leave-one-out, of query and gallery, of tracklets
    killed/CASE/                a run killed in the middle of its second epoch, and what it comes to if nothing kills it:
        recipe.yaml             what was asked for
        run/                    the run folder as the kill left it
        whole/                  metrics.jsonl, summary.json and the last weights of the same run, never interrupted
    finished/                   recipe.yaml, run/ with its report, embeddings/ of all images, and evaluate.json
    presets.json                the resolved config of every preset
    about.json                  which program, and which libraries, recorded all that

killed/osm_caa_video was recorded later than the others: until then, evaluations of tracklets moved the running statistics of a
batch normalisation over all ranks.

Only commands are used (`main` of pipeline.prepare, train, evaluate) and recipes, since modules move. Paths below the folder in which it
was recorded read "/recorded". A later program adds a recording of its own beside this one where it changes a format.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

import tests.compat.backbone  # noqa: F401  registers the network
from pipeline import evaluate, prepare, train
from pipeline.recipes import load_config, preset_names

RECORDED = Path(__file__).with_name("recorded")
ROOT = "/recorded"  # stands for the folder of storage and stores in every text file
KILLED_AT = 7  # training steps, of which each is saved: in the middle of the second epoch, of 4 to 6 steps
TEXT = (".yaml", ".json", ".jsonl", ".csv", ".html")
CASES: dict[str, dict[str, Any]] = {
    "mined": {"method.hard_negatives": 3, "method.memory": 30},
    "osm_caa": {"method.name": "osm_caa", "method.mode": "caffe"},
    "osm_caa_video": {
        "data.source": "video",
        "method.name": "osm_caa",
        "method.samples_per_class": 6,
        "method.classes_per_batch": 2,
        "method.frames": 3,
        "evaluation.metric": "map",
        "evaluation.clustering": False,
    },
    "intra_batch": {"method.name": "intra_batch", "method.sampler": "number", "method.reload_best": [1, 2]},
    "mmsi": {
        "length": "6 epochs",
        "method.name": "mmsi",
        "method.meta_classes": 3,
        "method.alpha": 4,
        "method.warmup_classes": 6,
        "method.memory_per_class": 4,
        "model.batch_norm": "frozen",
    },
    "smart_mining": {
        "method.name": "smart_mining",
        "method.triplets_per_batch": 12,
        "method.list_length": 12,
        "method.kappa_max": 2,
        "method.random_epochs": 1,
    },
    "gca_hng": {
        "method.name": "gca_hng",
        "method.heads": 2,
        "method.layers": 1,
        "method.warmup": "1 epochs",
        "method.graph_optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    },
}
FINISHED = {"name": "finished", "data.source": "shop", "length": "2 epochs"}


def recipe(storage: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A run of a second in float64, whose pixels no resampling touches, so that every machine sees the same.

    Args:
        storage: folder of runs and of `data`.
        changes: values by dotted key.
    """
    values: dict[str, Any] = {
        "name": "run",
        "storage": str(storage),
        "seed": 3,
        "length": "3 epochs",
        "precision": "float64",
        "data": {"source": "birds", "transforms": {"size": 16, "crop_scale": [1.0, 1.0]}},
        "model": {"backbone": "compat_tiny", "weights": "none", "batch_norm": "sync"},
        "method": {
            "name": "baseline",
            "classes_per_batch": 4,
            "samples_per_class": 3,
            "embedding_dim": 8,
            "optimizer": {"name": "adamw", "lr": 3e-3, "eps": 1e-6},
        },
        "evaluation": {"recall_at": [1, 2]},
        "checkpoint": {"every": "1 steps", "keep": 1},
        "cache": {"folder": f"{storage}/cache"},
        "runtime": {"workers": 0, "cpus_per_worker": 1, "loader": "in_process", "log_every": 1},
    }
    for key, value in changes.items():
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    if changes.get("method.name") == "smart_mining":  # which has no classes in a batch
        del values["method"]["classes_per_batch"], values["method"]["samples_per_class"]
    return values


def write_stores(data: Path, scratch: Path) -> None:
    """The three datasets, by the command: 16×16 pixels, 3 folds, several shards."""
    from tests.pipeline import shipped  # only here: what opens a recording needs nothing but the commands

    random = np.random.default_rng(0)
    for name, splits in (("birds", ("test",)), ("shop", ("query", "gallery"))):
        lines = ["path,label,split"]
        for i in range(16):
            pattern = np.kron(random.uniform(90, 160, (2, 2, 3)), np.ones((8, 8, 1)))
            for j in range(6 + i % 3 if i < 12 else 4):
                path = scratch / name / f"{i}-{j}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = random.normal(0, 40, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
                Image.fromarray(np.clip(pattern + noise, 0, 255).astype(np.uint8)).save(path)
                lines.append(f"{path},class {i:02d},{'train' if i < 12 else splits[j % len(splits)]}")
        (scratch / f"{name}.csv").write_text("\n".join(lines))
        done = prepare.main([
            "csv", str(scratch / f"{name}.csv"), "--to", str(data / name), "--name", name, "--folds", "3",
            "--images-per-shard", "32"])  # fmt: skip
        assert done == 0
    tracks = {
        "train": [(person, camera, 3) for person in range(1, 25, 2) for camera in (1, 2)],
        "test": [(-1, 1, 1), (0, 3, 1), (2, 1, 2), (2, 2, 2), (4, 1, 2), (4, 5, 1)],
    }
    shipped.mars(scratch / "mars", tracks, queries=[3, 5])
    done = prepare.main([
        "mars", "--from", str(scratch / "mars"), "--partial", "--to", str(data / "video"), "--name", "video",
        "--folds", "3", "--max-side", "16"])  # fmt: skip
    assert done == 0


def run_killed(recipe: Path) -> None:
    """The command, in a process of its own, which kills itself before it logs one more than KILLED_AT training steps."""
    command = [sys.executable, "-m", "tests.compat.record", str(recipe)]
    status = subprocess.run(command).returncode
    assert status == -signal.SIGKILL, status


def train_until_killed(recipe: str) -> int:
    def watch(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and str(details[0]).endswith("metrics.jsonl") and details[1] == "a":
            path = Path(str(details[0]))
            if path.exists() and path.read_text().count('"kind": "train"') == KILLED_AT:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return train.main([recipe])


def record_killed(case: str, root: Path, target: Path) -> None:
    for part in ("run", "whole"):
        storage = root / part
        shutil.copytree(root / "data", storage / "data")
        path = storage / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(storage, {"name": case, **CASES[case]})))
        if part == "run":
            run_killed(path)
        else:
            assert train.main([str(path)]) == 0
    [saved] = (root / "run" / "runs" / case / "checkpoints").glob("*/checkpoint.json")
    assert json.loads(saved.read_text())["progress"]["step_in_epoch"] > 0, (
        "the kill was to be in the middle of an epoch"
    )
    done = root / "whole" / "runs" / case
    keep(root / "run" / "runs" / case, target / "run", root / "run")
    keep(root / "run" / "recipe.yaml", target / "recipe.yaml", root / "run")
    for name in ("metrics.jsonl", "summary.json"):
        keep(done / name, target / "whole" / name, root / "whole")
    last = max((done / "checkpoints").iterdir())
    for name in ("trunk.safetensors", "method.safetensors"):
        keep(last / name, target / "whole" / name, root / "whole")
    for part in ("run", "whole"):
        shutil.rmtree(root / part)


def record_finished(root: Path, target: Path) -> None:
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(root, FINISHED)))
    assert train.main([str(path)]) == 0
    done = str(root / "runs" / "finished")
    assert evaluate.main([done, "--split", "all", "--embed-to", str(root / "embeddings"), "--workers", "0"]) == 0
    assert evaluate.main([done, "--clustering", "--json", str(root / "evaluate.json")]) == 0
    for name in ("recipe.yaml", "embeddings", "evaluate.json"):
        keep(root / name, target / name, root)
    keep(root / "runs" / "finished", target / "run", root)


def resolved_presets() -> dict[str, Any]:
    """The config with which the command would start, by preset."""
    return {name: load_config(name).model_dump(mode="json") for name in preset_names()}


def keep(source: Path, target: Path, root: Path) -> None:
    """Copies a file or a folder; `root` becomes ROOT in text. TensorBoard's files are left out: no program reads them."""
    files = [p for p in source.rglob("*") if p.is_file() and "tensorboard" not in p.parts] if source.is_dir() else []
    for file in files or [source]:
        to = target / file.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        data = file.read_bytes()
        to.write_bytes(data.replace(str(root).encode(), ROOT.encode()) if file.suffix in TEXT else data)


def main() -> None:
    shutil.rmtree(RECORDED, ignore_errors=True)
    os.environ.pop("RAYDML_HOME", None)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_stores(root / "data", root / "scratch")
        keep(root / "data", RECORDED / "stores", root / "scratch")
        for case in CASES:
            record_killed(case, root, RECORDED / "killed" / case)
        record_finished(root, RECORDED / "finished")
    (RECORDED / "presets.json").write_text(json.dumps(resolved_presets(), indent=0, sort_keys=True) + "\n")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    about = {"commit": commit, "python": platform.python_version()}
    libraries = ("torch", "torchvision", "timm", "numpy", "pyarrow", "faiss-gpu", "pytorch-metric-learning")
    about |= {name: importlib.metadata.version(name) for name in libraries}
    (RECORDED / "about.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.exit(train_until_killed(sys.argv[1]))
    main()
