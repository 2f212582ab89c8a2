"""Memory of a worker, measured by two training steps on synthetic pixels in a process of its own.

    python -m pipeline.diagnosis.measured_step < {"config": ..., "store": URI or null}

The labels are the dataset's own, so that batches, proxies and classifiers have their size; without a dataset there are made-up
ones. Ranks that are not there contribute nothing: DDP with its buckets, the share of a batch and the whole batch's features are
those of a worker among the fewest that `runtime.workers` allows. The second step has the optimizers' moments, which the first one makes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from methods import Method
from methods.base import MethodError
from methods.config import Clock
from pipeline import ROOT
from pipeline.config import Config, build_config
from pipeline.data.loader import ImageSource
from pipeline.data.store import Samples, Store
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.cpus import use_cpus
from pipeline.errors import RunError, UserError, one_line
from pipeline.evaluation.embedder import Embedder, EvaluatedTrunk
from pipeline.model.network import build_network, num_classes
from pipeline.storage import Folder
from pipeline.training.context import RunContext
from pipeline.training.parts import build_mining

STEPS = 2
MADE_UP_CLASSES, MADE_UP_IMAGES = 1000, 10  # of each class, where there is no dataset
MAX_MINED = 8192  # samples that a method mines in; its memory for all of them is computed
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class MeasuredStep:
    """What a worker takes.

    Attributes:
        start_bytes: Memory of the process before the network is made: about that of a loader's process.
        peak_bytes: Its largest resident memory, images of the batch included.
        shared_bytes: The part of both that is files of libraries, which processes of one machine share.
        gpu_bytes: Largest memory that tensors took on the GPU; None: not measured on one.
        checkpoint_bytes: Size of a checkpoint: weights, method, optimizers.
        seconds: Time of the second step.
        images: Images of this worker in a step.
        classes: Classes that the method was made for.
    """

    start_bytes: int
    peak_bytes: int
    shared_bytes: int
    gpu_bytes: int | None
    checkpoint_bytes: int
    seconds: float
    images: int
    classes: int


class StepTimeout(RunError):
    """The steps were not made within the time that the diagnosis gives them."""


class OneOfSeveral(Ranks):
    """Rank 0 of some workers, in a group of this process alone."""

    def collect(self, value: Any) -> list[Any]:
        return [value] * self.world


class SyntheticEmbedder(Embedder):
    """Embeds one batch of noise, for the memory that takes, and gives random embeddings of all samples."""

    @torch.no_grad()
    def __call__(self, ids: np.ndarray, trunk: EvaluatedTrunk, method: Method | None) -> Tensor:
        trunk.set_mode(False, self.ranks)
        if method is not None:
            method.eval()
        count = min(self.batch_size, len(ids))
        embeddings = self._embed(noise(count, self.source.transforms.size, self.device), trunk, method)
        rows = torch.randn(len(ids), embeddings.shape[1], dtype=embeddings.dtype, device=self.device)
        return torch.nn.functional.normalize(rows)


def noise(images: int, size: int, device: torch.device) -> Tensor:
    """Random pixels, uint8 [images, 3, size, size]."""
    return torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, device=device)


def made_up_samples(config: Config) -> Samples:
    """A training set of no images, with more classes than a batch has."""
    classes = max(MADE_UP_CLASSES, config.method.classes_per_batch)
    each = max(MADE_UP_IMAGES, config.method.samples_per_class)
    labels = np.repeat(np.arange(classes), each)
    ids = np.arange(len(labels))
    return Samples(ids, labels, tuple(map(str, range(classes))), tracks=2 * labels + ids % 2)


def measure(config: Config, samples: Samples, uri: str = "") -> MeasuredStep:
    """Makes the two steps here; changes this process's number of threads and its peak of memory.

    Raises:
        UserError, RunError: A step cannot be made.
    """
    runtime = config.runtime
    use_cpus(runtime.cpus_per_worker or 1)
    start_bytes = _status_bytes("VmRSS")
    device = torch.device("cuda", 0) if runtime.gpus_per_worker else torch.device("cpu")
    ranks = OneOfSeveral(0, max(1, runtime.min_workers))
    classes = num_classes(samples)
    if config.method.mining is not None and len(samples) > MAX_MINED:
        fitting = int(np.searchsorted(np.cumsum(np.bincount(samples.labels)), MAX_MINED, side="right"))
        samples = samples.subset(samples.labels < max(fitting, config.method.classes_per_batch))
    trunk, method = build_network(config, classes, device)
    source = ImageSource(uri, "", None, config.data.transforms.of_evaluation(), config.seed)
    embedder = SyntheticEmbedder(
        source, "in_process", 1, config.evaluation.batch_size, config.precision, device, Ranks()
    )
    with tempfile.TemporaryDirectory(prefix="raydml-doctor-") as folder:
        if ranks.world > 1:
            backend, group = "nccl" if device.type == "cuda" else "gloo", f"file://{folder}/group"
            dist.init_process_group(backend, init_method=group, rank=0, world_size=1, timeout=timedelta(seconds=60))
        config = config.model_copy(update={"storage": folder})
        mining = build_mining(config, len(samples), (), ranks, device)
        try:
            if mining is not None:
                mining.begin(1, None)
            context = RunContext(
                samples=samples, seed=config.seed, length=config.length, precision=config.precision, device=device,
                ranks=ranks, trunk=trunk, method=method, embedder=embedder, load_best=lambda: None, mining=mining,
            )  # fmt: skip
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            images, seconds = _steps(context, config)
        finally:
            if mining is not None:
                mining.close()
            if ranks.world > 1:
                dist.destroy_process_group()
    embedder(samples.ids[: config.evaluation.batch_size], trunk, method)
    states: list[Any] = [trunk.state_dict(), method.state_dict()]
    states += [optimizer.inner.state_dict() for optimizer in context.optimizers.values()]
    gpu_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return MeasuredStep(
        start_bytes=start_bytes, peak_bytes=_status_bytes("VmHWM"), shared_bytes=_status_bytes("RssFile"), gpu_bytes=gpu_bytes,
        checkpoint_bytes=sum(map(_tensor_bytes, states)), seconds=seconds, images=images, classes=classes,
    )  # fmt: skip


def _steps(context: RunContext, config: Config) -> tuple[int, float]:
    """Images of this worker in a step, and seconds of the last one."""
    method = context.method
    context.begin_epoch(Clock(), 0)
    method.on_epoch_start(0, context)
    plan = method.plan(0, context)
    images, seconds = 0, 0.0
    for step in range(STEPS):
        row = step % len(plan)
        share = context.ranks.slice(plan.ids.shape[1])
        images = share.stop - share.start
        pixels = noise(images, config.data.transforms.size, torch.device("cpu"))
        started = time.perf_counter()
        batch = context.begin_step(Clock(step, step / len(plan)), plan, row, pixels)
        try:
            method.training_step(batch, context)
        except MethodError as error:
            raise RunError(f"a step on random pixels cannot be computed: {error}") from error
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return images, seconds


def _status_bytes(name: str) -> int:
    """A size of this process as Linux counts it: VmRSS (resident now), VmHWM (largest), RssFile (of files)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


# ---- in a process of its own -----------------------------------------------------------------------------------------


class StepProcess:
    """The process that makes the steps; started at once, asked for its result later.

    Args:
        config: The configuration; the weights are random whatever it says.
        store: URI of the dataset; None: it is not prepared yet.
    """

    def __init__(self, config: Config, store: str | None) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, *filter(None, sys.path)])}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        values = config.model_dump(mode="json")
        values["model"]["weights"] = "none"
        self._request = json.dumps({"config": values, "store": store})
        assert self._process.stdin is not None
        self._process.stdin.write(self._request)
        self._process.stdin.close()
        self._process.stdin = None

    def stop(self) -> None:
        """Ends the process, whose result is not wanted."""
        self._process.kill()
        self._process.communicate()

    def result(self, timeout_s: float = TIMEOUT_S) -> MeasuredStep:
        """Waits for the result.

        Raises:
            StepTimeout: They took too long.
        RunError: The steps could not be made.
        """
        try:
            out, errors = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise StepTimeout(f"two training steps took more than {timeout_s:g} s here") from None
        lines = out.splitlines()
        if self._process.returncode < 0:
            raise RunError(
                f"the process of a training step was killed by signal {-self._process.returncode}: is its memory enough?"
            )
        answer = json.loads(lines[-1]) if lines else {"error": (errors.strip().splitlines() or ["no answer"])[-1]}
        if "error" in answer:
            raise RunError(str(answer["error"]))
        return MeasuredStep(**answer)


def measured_here(config: dict[str, Any], store: str | None) -> dict[str, Any]:
    """The same as values, for a Ray task on a node with a GPU."""
    return asdict(StepProcess(build_config(config), store).result())


def main() -> int:
    """Reads the request from stdin, prints the result as JSON."""
    request = json.load(sys.stdin)
    try:
        config = build_config(request["config"])
        if request["store"] is None:
            samples = made_up_samples(config)
        else:
            samples = Store(Folder(request["store"])).select(["train"], without_fold=config.data.validation_fold)
        answer = asdict(measure(config, samples, request["store"] or ""))
    except (UserError, RunError, RuntimeError, MemoryError, ValueError) as error:
        answer = {"error": one_line(error)}  # CUDA's out-of-memory is a RuntimeError
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
