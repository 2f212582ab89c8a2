"""`python -m tools.gpu_check --json gpu.json`: every method on this machine's GPU against its CPU; one table to look at and to send in.

    method       the same run in float64 on the CPU and on the GPU: training, evaluation, mining; difference of the final weights
    again        the run on the GPU a second time: bit for bit the same
    resumed      the run on the GPU, stopped in the middle of an epoch and continued: bit for bit the same
    in parts     the same with `runtime.images_per_pass`, against the whole batch
    loaded       `raydml.load(RUN).embed` on the GPU against the CPU
    waits        how often a step makes the host wait for the GPU (torch.cuda.set_sync_debug_mode)

Random numbers that a method draws on its device are others on a GPU: gca_hng and intra_batch are compared with dropout and
interpolation drawn on the CPU in both runs. `--device cpu --methods osm_caa` runs the check without a GPU, which shows nothing but that
it works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline.config import build_config
from pipeline.data.store import Store
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.run_status import RunStatus
from pipeline.inference.load_model import load_model
from pipeline.runs.run_folder import run_folder
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values, write_tiny_store
from pipeline.training.loop import Worker
from pipeline.training.start import record

METHODS: dict[str, dict[str, Any]] = {
    "baseline": {"method.loss": "TripletMarginLoss", "method.miner": "MultiSimilarityMiner"},
    "proxies": {"method.loss": "ProxyAnchorLoss"},
    "mined": {"method.hard_negatives": 3, "method.memory": 30},
    "matryoshka": {"method.matryoshka": [2, 4]},
    "osm_caa": {"method.name": "osm_caa"},
    "intra_batch": {"method.name": "intra_batch", "method.dropout": 0.0},
    "mmsi": {
        "method.name": "mmsi", "method.meta_classes": 3, "method.alpha": 4, "method.warmup_classes": 6,
        "method.memory_per_class": 4, "model.batch_norm": "frozen",
    },
    "smart_mining": {
        "method.name": "smart_mining", "method.random_epochs": 1, "method.triplets_per_batch": 8, "method.list_length": 12,
        "method.kappa_max": 2, "method.classes_per_batch": 24, "method.samples_per_class": 4,
    },
    "gca_hng": {
        "method.name": "gca_hng", "method.heads": 2, "method.layers": 1, "method.edge_dropout": 0.0, "method.warmup": "1 epochs",
        "method.graph_optimizer": {"name": "sgd", "lr": 0.1},
    },
}  # fmt: skip
IN_PARTS = ("osm_caa", "mmsi", "gca_hng")
CLOSE = 1e-6  # of the weights in float64, relative to the largest of their tensor


class _StopAt(RunStatus):
    """Asks a run to stop after a step."""

    def __init__(self, step: int | None) -> None:
        super().__init__()
        self.at = step

    def publish(self, progress: dict[str, Any]) -> None:
        super().publish(progress)
        if self.at is not None and progress.get("step", 0) >= self.at:
            self.stop()


class _DrawnOnCpu(TorchFunctionMode):
    """`torch.rand` with a generator draws the CPU's numbers, whatever the device."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[torch.Generator, torch.Generator]] = {}  # by the generator that is asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("generator")
        if func is not torch.rand or asked is None or asked.device.type == "cpu":
            return func(*args, **kwargs)
        _, drawn = self._made.setdefault(id(asked), (asked, torch.Generator().manual_seed(asked.initial_seed())))
        device = kwargs.pop("device")
        return func(*args, **{**kwargs, "generator": drawn}).to(device)


class Check:
    """The runs of a check and their rows.

    Args:
        root: A temporary folder.
        device: The device that is checked.
    """

    def __init__(self, root: str, device: torch.device) -> None:
        self.root, self.device = root, device
        self.store = write_tiny_store(Path(root)).folder.uri
        self.rows: list[dict[str, Any]] = []

    def row(self, what: str, measured: Callable[[], tuple[bool, str]]) -> None:
        """Adds a row; whatever goes wrong in it is told there, and the other rows are made all the same."""
        started = time.perf_counter()
        try:
            passed, text = measured()
        except Exception as error:
            passed, text = False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        seconds = round(time.perf_counter() - started, 1)
        self.rows.append({"check": what, "passed": passed, "found": text, "seconds": seconds})
        print(f"{'ok  ' if passed else 'FAIL'}  {what:26}  {text}  ({seconds} s)", flush=True)

    def train(self, method: str, name: str, device: torch.device, *stops: int, **changes: Any) -> tuple[Worker, int]:
        """Trains a run, stopped at steps and continued; with the largest number of waits of a step."""
        values = {"name": f"{method}-{name}", "length": "2 epochs", "runtime.log_every": 100, **METHODS[method]}
        config = build_config(
            tiny_values(self.root, self.store, values | {k.replace("__", "."): v for k, v in changes.items()})
        )
        record(config, run_folder(config), Store(Folder(self.store)), [])
        waits: list[int] = []
        for stop in (*stops, None):
            worker = Worker(config, self.store, Ranks(), device, _StopAt(stop))
            worker._training_step = _counted(worker._training_step, device, waits)  # type: ignore[method-assign]
            with _DrawnOnCpu():
                worker()
        return worker, max(waits)

    def method(self, name: str) -> None:
        """The rows of one method."""
        found: dict[str, dict[str, Tensor]] = {}

        def against_cpu() -> tuple[bool, str]:
            found["cpu"] = weights(self.train(name, "cpu", torch.device("cpu"))[0])
            worker, waits = self.train(name, "device", self.device)
            found["device"] = weights(worker)
            worst = difference(found["device"], found["cpu"])
            return worst <= CLOSE, f"weights differ by {worst:.1e} from the CPU's; {waits} waits in a step"

        def equal(kind: str, *stops: int) -> tuple[bool, str]:
            got = weights(self.train(name, kind, self.device, *stops)[0])
            different = [n for n, value in found["device"].items() if not torch.equal(value, got[n])]
            return not different, f"{len(different)} of {len(got)} tensors differ"

        def in_parts() -> tuple[bool, str]:
            whole = weights(self.train(name, "whole", self.device, model__batch_norm="frozen")[0])
            changes = {"model__batch_norm": "frozen", "runtime__images_per_pass": 5}
            worst = difference(weights(self.train(name, "parts", self.device, **changes)[0]), whole)
            return worst <= CLOSE, f"weights differ by {worst:.1e} from those of whole batches"

        self.row(name, against_cpu)
        self.row(f"{name}: again", lambda: equal("again"))
        self.row(f"{name}: resumed", lambda: equal("resumed", 3))
        if name in IN_PARTS:
            self.row(f"{name}: in parts", in_parts)

    def loaded(self, method: str) -> tuple[bool, str]:
        """A trained model on both devices."""
        config = build_config(tiny_values(self.root, self.store, {"name": f"{method}-cpu", **METHODS[method]}))
        images = torch.randint(
            0, 256, (9, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        ).numpy()
        rows = [load_model(run_folder(config).uri, device=d).embed(list(images)).cpu() for d in (self.device, "cpu")]
        worst = float((rows[0] - rows[1]).abs().max())
        return worst <= 1e-5, f"embeddings differ by {worst:.1e} from the CPU's"


def _counted(step: Callable[..., Any], device: torch.device, waits: list[int]) -> Callable[..., Any]:
    """A training step whose waits for a GPU are counted."""

    def counted(batch: Any) -> Any:
        with _waits(device) as seen:
            found = step(batch)
        waits.append(len(seen))
        return found

    return counted


@contextlib.contextmanager
def _waits(device: torch.device) -> Iterator[list[Any]]:
    """Warnings of torch about waits, of the block."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        synchronising: list[Any] = []
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield synchronising
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            synchronising += [w for w in seen if "synchronizing" in str(w.message)]


def weights(worker: Worker) -> dict[str, Tensor]:
    """All tensors of a trained network, on the CPU."""
    parts = {"trunk": worker.trunk, "method": worker.method}
    tensors = {f"{part}.{n}": v for part, m in parts.items() for n, v in m.state_dict().items()}
    return {n: v.detach().cpu().clone() for n, v in tensors.items() if isinstance(v, Tensor)}


def difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a weight, relative to the largest of its tensor."""
    found = [
        float((got[n] - value).abs().max() / value.abs().max().clamp(min=1e-3))
        for n, value in expected.items()
        if value.is_floating_point() and value.numel()
    ]
    return max(found)


def facts(device: torch.device) -> dict[str, str]:
    """What the table was measured on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "gpus": str(torch.cuda.device_count())}
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check; 0: every row passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (default: cuda)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--json", metavar="FILE", help="write facts and rows to a file")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU here: run this where there is one, or with --device cpu", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value}" for name, value in facts(device).items()))
    with tempfile.TemporaryDirectory(prefix="raydml-gpu-") as root:
        check = Check(root, device)
        for name in given.methods:
            check.method(name)
        check.row("loaded", lambda: check.loaded(given.methods[0]))
    failed = [row for row in check.rows if not row["passed"]]
    print(f"{len(check.rows) - len(failed)} of {len(check.rows)} passed")
    if given.json:
        Path(given.json).write_text(json.dumps({"facts": facts(device), "rows": check.rows}, indent=1))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
