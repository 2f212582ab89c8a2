"""The parts of a configuration that say where and how a run is trained: workers, mining servers, checkpoints, caches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from methods import plugins
from methods.config import BaseConfig, Length
from pipeline.errors import did_you_mean

RUNTIME: dict[str, Any] = {"runtime": True}  # a key that may change when a run is continued


class CheckpointConfig(BaseConfig):
    """Checkpoints to resume from; the best one is kept beside them."""

    every: Length = Field(Length(value=1, unit="epochs"), description="time between two checkpoints")
    keep: int = Field(2, ge=1, description="number of the newest checkpoints that are kept")


class MiningConfig(BaseConfig):
    """The mining server, for methods that mine over the whole training set; of no effect for others."""

    consistency: Literal["exact", "async"] = Field(
        "exact",
        description="a search reflects exactly the updates sent before it | those that have arrived (not reproducible)",
    )
    engine: Literal["auto", "exact", "ivf", "ivf_fp16", "ivf_pq", "hnsw", "nsg"] = Field(
        "auto",
        description="nearest-neighbour search; auto: exact up to 8,192 rows or where an index would cost more, else "
        "ivf_fp16",
    )
    recall: float = Field(
        0.95, gt=0, le=1, description="recall that an approximate index has to reach, 0 to 1; below it, search is exact"
    )
    rebuild_every: Length = Field(
        Length(value=1, unit="epochs"), description="time between two builds of an approximate index"
    )
    swap_after: int = Field(50, ge=0, description="steps from the start of building an index to its first use")
    dtype: Literal["float32", "float16"] = Field("float32", description="number format of the table of embeddings")
    memory_dtype: Literal["float32", "float16"] = Field(
        "float32", description="number format of the embeddings in the memory"
    )
    shards: int = Field(
        1, ge=1, description="number of servers, each with a part of the rows", json_schema_extra=RUNTIME
    )
    cpus: int = Field(1, ge=1, description="threads of each server", json_schema_extra=RUNTIME)
    gpus: float = Field(0.0, ge=0, description="GPUs of each server, for IVF indexes", json_schema_extra=RUNTIME)
    resource: str | None = Field(
        None,
        description="custom Ray resource of the nodes that servers are placed on (not spot nodes); none: any node",
        json_schema_extra=RUNTIME,
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels of the nodes that servers are placed on, such as {ray.io/market-type: on-demand}",
        json_schema_extra=RUNTIME,
    )
    memory: int = Field(
        0,
        ge=0,
        description="memory that a node must have free for each server, bytes; 0: not asked for",
        json_schema_extra=RUNTIME,
    )
    in_flight: int = Field(
        8,
        ge=1,
        description="largest number of batches sent to the servers and not yet answered",
        json_schema_extra=RUNTIME,
    )
    deadline_s: float = Field(
        120.0,
        gt=0,
        description="time without a reachable server after which the run fails, seconds",
        json_schema_extra=RUNTIME,
    )


class WorkerRange(BaseConfig):
    """A number of workers that follows the nodes of the cluster."""

    min: int = Field(ge=1, description="smallest number of workers that the run goes on with")
    max: int = Field(ge=1, description="largest number of workers")
    grow_after_s: float = Field(
        60.0, ge=0, description="least time between the start of the workers and their start again with more, seconds"
    )

    @model_validator(mode="after")
    def _check(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, larger than max, {self.max}")
        return self


_Workers = Annotated[
    Annotated[int, Field(ge=0), Tag("<number>")] | Annotated[WorkerRange, Tag("<range>")],
    Discriminator(lambda value: "<range>" if isinstance(value, (Mapping, WorkerRange)) else "<number>"),
]


class RuntimeConfig(BaseConfig):
    """Resources and speed; they do not change results (beyond rounding, where the number of workers changes)."""

    workers: _Workers = Field(
        1,
        description="Ray Train workers; 0: this process, without Ray Train; {min: 1, max: 4}: as many as there is room "
        "for, also while nodes come and go",
    )
    cpus_per_worker: int | None = Field(
        None,
        ge=1,
        description="threads of each worker (none: the machine's cores divided by the workers; 2 on a cluster)",
    )
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each worker; 0 trains on the CPU")
    loader: Literal["ray", "in_process"] = Field(
        "ray", description="images are loaded by a Ray Data pipeline | by a thread of the worker"
    )
    loader_cpus: int = Field(1, ge=1, description="CPUs of each worker's Ray Data pipeline")
    max_failures: int = Field(3, ge=0, description="largest number of restarts of the workers after a crash")
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics.jsonl")
    hang_timeout_s: float = Field(
        600.0,
        gt=0,
        description="time after which a worker that does not answer, or a training step that does not end, is taken for a hang and "
        "the workers start again, seconds; evaluations, checkpoints and plans may take longer",
    )
    skip_nonfinite: int = Field(
        0,
        ge=0,
        description="largest number of steps in a row that are left out because features, loss or gradient are not finite; the "
        "next such step ends the run",
    )
    images_per_pass: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="largest number of images that the trunk is given at once: a larger batch of a worker passes in parts, with the "
        "memory of one part, the same gradients and a third more computing; auto: as many as fit a GPU's memory (none: the whole batch)",
    )
    deterministic: bool = Field(True, description="use deterministic torch kernels")
    memory_per_worker: int = Field(
        0, ge=0, description="memory that a node must have free for each worker, bytes; 0: not asked for"
    )
    worker_resources: dict[str, float] = Field(
        default_factory=dict, description="custom Ray resources of each worker, such as {spot: 0.01}"
    )
    worker_labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels of the nodes that workers are placed on, such as {ray.io/accelerator-type: L4}; values may be "
        "!VALUE, in(A, B), !in(A, B)",
    )
    loader_labels: dict[str, str] = Field(
        default_factory=dict, description="labels of the nodes that the Ray Data pipelines run on"
    )

    @property
    def min_workers(self) -> int:
        """Smallest number of workers."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def max_workers(self) -> int:
        """Largest number of workers; 0: the process of the command."""
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers


TRACKERS = ("wandb", "mlflow")
_SECRET = re.compile(r"(^|_)(key|token|password|passwd|secret)s?($|_)", re.IGNORECASE)


class TrackerConfig(BaseConfig):
    """A tracker: its name alone, or with arguments."""

    name: str = Field(description="wandb | mlflow | module:CLASS of your own")
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="wandb: project, entity, group, job_type, notes, tags, mode; mlflow: experiment, tracking_uri, tags; of your "
        "own class: arguments of its constructor; never a key or a password",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value.strip()} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> TrackerConfig:
        if self.name not in TRACKERS and not plugins.is_import_string(self.name):
            raise ValueError(f"tracker {self.name!r} is unknown: {did_you_mean(self.name, TRACKERS)}")
        secret = next((name for name in self.args if _SECRET.search(name)), None)
        if secret is not None:
            raise ValueError(
                f"args.{secret} of {self.name} looks like a secret, which would be written to config.yaml: set it in the environment"
            )
        return self


class CacheConfig(BaseConfig):
    """Each node's copies of training splits, for random access to images."""

    folder: str | None = Field(
        None, description="folder on the node's own disk (none: STORAGE/cache or ~/raydml/cache)"
    )
    max_bytes: int = Field(
        100 * 2**30,
        ge=0,
        description="largest size of all copies together, bytes; a larger split is read from the store instead",
    )
    decoded: bool = Field(
        False,
        description="copies hold decoded pixels: no step decodes, for some ten times the room of JPEGs; a split whose pixels "
        "take more than max_bytes is kept encoded. Nothing computed changes",
    )
