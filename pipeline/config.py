"""The configuration of a run: typed, frozen, and checked before any cluster time is spent.

Precedence: defaults < preset < recipe file < `--set a.b=c`. Keys marked *runtime* may change when a
run is resumed; a change of any other key makes it another run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from methods import METHODS, MethodConfig, method_class, method_names, plugins
from methods.config import BaseConfig, Length
from pipeline.config_model import ModelConfig
from pipeline.config_problems import explain
from pipeline.config_runtime import (
    RUNTIME,
    CacheConfig,
    CheckpointConfig,
    MiningConfig,
    RuntimeConfig,
    TrackerConfig,
    WorkerRange,
)
from pipeline.data.transforms import TransformConfig
from pipeline.errors import UserError, check_address_is_public, did_you_mean
from pipeline.metric_names import metric_key, metric_keys
from pipeline.storage import home


class DataConfig(BaseConfig):
    """The dataset of training and evaluation."""

    source: str = Field(
        "emoji",
        description="name of a dataset below STORAGE/data (emoji is prepared automatically), or folder or s3:// URI of "
        "a store",
    )
    validation_fold: int | None = Field(
        0,
        ge=0,
        description="number of the fold of training classes held out for every choice; none: train on all classes and "
        "report the last checkpoint",
    )
    transforms: TransformConfig = TransformConfig()


class RerankingConfig(BaseConfig):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017)."""

    k1: int = Field(20, ge=1, description="number of nearest neighbours that may be reciprocal")
    k2: int = Field(
        6, ge=1, description="number of nearest neighbours over which features are averaged, the row included"
    )
    weight: float = Field(0.3, ge=0, le=1, description="weight of the original distance (the paper's lambda)")


class EvaluationConfig(BaseConfig):
    """The metrics, and the checkpoint that the final figures are measured with."""

    every: Length = Field(
        Length(value=1, unit="epochs"), description="time between two evaluations on the validation fold"
    )
    recall_at: tuple[int, ...] = Field((1, 2, 4, 8), min_length=1, description="every K of Recall@K, or of CMC@K")
    metric: str = Field(
        "map@r",
        description="metric that chooses the best checkpoint: map@r, r_precision, or recall@K with K in recall_at; for "
        "re-identification map, map_trapezoidal, or cmc@K",
    )
    distance: Literal["cosine", "euclidean"] = Field(
        "cosine",
        description="distance that ranks final embeddings; euclidean takes some 30 times the CPU time, and ranks as cosine does "
        "where a method's embeddings have length one; mining while training is not changed",
    )
    distractors: Literal["wrong", "junk"] = Field(
        "wrong", description="re-identification: distractors in the gallery count as wrong | are left out"
    )
    reranking: RerankingConfig | None = Field(None, description="re-identification: k-reciprocal re-ranking")
    checkpoint: Literal["best", "last"] = Field("best", description="checkpoint reported in summary.json")
    test: bool = Field(
        True, description="measure the test classes at the end; set to false for runs that only choose settings"
    )
    clustering: bool = Field(True, description="compute NMI and AMI of a k-means clustering, at the end only")
    batch_size: int = Field(256, ge=1, description="images in a forward pass", json_schema_extra=RUNTIME)

    @field_validator("metric", mode="before")
    @classmethod
    def _metric(cls, value: Any) -> Any:
        """Accepts other letters, and R@1 for recall@1."""
        return metric_key(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if any(k < 1 for k in self.recall_at):
            raise ValueError(f"recall_at is {self.recall_at}, every K has to be at least 1")
        metrics = [*metric_keys("retrieval", self.recall_at), *metric_keys("reid", self.recall_at)]
        if self.metric not in metrics:
            raise ValueError(f"metric is {self.metric!r}, expected one of {metrics}")
        if self.reranking is not None and self.distance != "cosine":
            raise ValueError("re-ranking is by cosine: leave out reranking, or set distance to cosine")
        return self


class Config(BaseConfig):
    """A run."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run and of its folder below STORAGE/runs",
    )
    storage: str = Field(
        "",
        description="folder of datasets and runs, an absolute path or s3:// URI (default $RAYDML_HOME, else ~/raydml)",
        json_schema_extra=RUNTIME,
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of all random numbers: weights, batches, augmentation")
    protocol: Literal["fair", "paper"] = Field(
        "fair",
        description="fair: choices on the validation fold, test classes measured once; paper: choices on the test "
        "classes, which every report says",
    )
    length: Length = Field(
        Length(value=10, unit="epochs"),
        description="length of the run, steps or epochs; may grow when a run is resumed",
        json_schema_extra=RUNTIME,
    )
    precision: Literal["float64", "float32", "bf16"] = Field(
        "float32", description="number format of training; bf16: the trunk in bfloat16 autocast, all else in float32"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    method: SerializeAsAny[MethodConfig] = Field(default_factory=lambda: METHODS["baseline"].Config(name="baseline"))
    mining: MiningConfig = MiningConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), json_schema_extra=RUNTIME)
    tracking: tuple[TrackerConfig, ...] = Field(
        (),
        description="services and own classes that get config, curves, figures and report, such as [wandb, {name: mlflow, args: "
        "{experiment: shoes}}]; metrics.jsonl and TensorBoard files are always written",
        json_schema_extra=RUNTIME,
    )
    cache: CacheConfig = Field(CacheConfig(), json_schema_extra=RUNTIME)
    runtime: RuntimeConfig = Field(RuntimeConfig(), json_schema_extra=RUNTIME)

    @field_validator("precision", mode="before")
    @classmethod
    def _precision(cls, value: Any) -> Any:
        if str(value).strip().lower() in ("fp16", "float16", "half", "16", "16-mixed"):
            raise ValueError(
                f"got {value!r}: float16 needs its loss scaled, and one scale cannot serve the methods' several losses, gradients along "
                "the way and optimizers; use bf16, which is as fast, takes as little memory and needs no scale"
            )
        return value

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Any:
        if isinstance(value, MethodConfig):
            return value
        section = value if isinstance(value, Mapping) else {"name": value}
        name = section.get("name", "baseline")
        known = isinstance(name, str) and (name in METHODS or plugins.is_import_string(name))
        if not known and name not in method_names():  # reads the metadata of all installed packages, 50 ms
            raise ValueError(f"method {name!r} is unknown: {did_you_mean(str(name), method_names())}")
        if name in METHODS:
            return METHODS[name].Config.model_validate(dict(section) | {"name": name})
        own = method_class(name).Config  # may declare another name than the one that it is found under
        declared = own.model_fields["name"].get_default()
        named = {"name": declared if isinstance(declared, str) else name}
        return own.model_validate(dict(section) | named).model_copy(update={"name": name})

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.length.value == 0:
            raise ValueError("length is 0: give the run a length such as '3 epochs'")
        if self.protocol == "paper" and self.data.validation_fold is not None:
            raise ValueError(
                "the paper protocol chooses on the test classes and trains on all others: set data.validation_fold to null"
            )
        if self.evaluation.checkpoint == "best" and not self.validates:
            raise ValueError(
                "evaluation.checkpoint is 'best', but without data.validation_fold there is nothing to choose on: set 'last'"
            )
        if self.method.needs_best and not self.validates:
            raise ValueError(
                "method.reload_best returns to the best weights, but without data.validation_fold there is nothing to choose "
                "them on: set a fold, or method.reload_best to []"
            )
        if self.method.requires_frozen_batch_norm and self.model.batch_norm != "frozen":
            raise ValueError(
                f"model.batch_norm is {self.model.batch_norm}, but {self.method.name} needs forward-mode derivatives of the "
                "trunk, which are only possible with frozen batch normalisation: set model.batch_norm to frozen"
            )
        if self.runtime.gpus_per_worker and self.precision == "float64":
            raise ValueError("precision float64 is for the CPU; use float32 or bf16 on a GPU")
        if isinstance(self.runtime.workers, WorkerRange) and self.runtime.gpus_per_worker % 1:
            raise ValueError(
                f"runtime.gpus_per_worker is {self.runtime.gpus_per_worker:g}: with a range of runtime.workers each worker needs "
                "whole GPUs"
            )
        return self

    @property
    def validates(self) -> bool:
        """True if classes are evaluated during training: the held-out fold, or (paper protocol) the test classes."""
        return self.data.validation_fold is not None or self.protocol == "paper"

    @property
    def root(self) -> str:
        """Folder of datasets and runs, with the default filled in."""
        return self.storage or home()


def build_config(values: Mapping[str, Any]) -> Config:
    """Validates a mapping; a pydantic error becomes one line a problem.

    Raises:
        UserError: A key or a value cannot be, or an address holds a secret, which would be written to config.yaml and reports.
    """
    for key, value in _flatten(values):
        for text in _texts(value):
            check_address_is_public(text, key)
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        lines = [explain(problem, values, Config) for problem in error.errors()]
        raise UserError("; ".join(lines)) from None


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flat_config(config: Config) -> dict[str, Any]:
    """The configuration by dotted key."""
    return dict(_flatten(config.model_dump(mode="json")))


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], runtime: bool) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each key in which two dumped configs differ: the runtime keys, or all others."""
    runtime_keys = set(_runtime_keys(Config))
    before = dict(_flatten(old))
    after = dict(_flatten(new))
    out = {}
    for key in sorted({*before, *after}):
        is_runtime = any(key == k or key.startswith(k + ".") for k in runtime_keys)
        if is_runtime == runtime and before.get(key) != after.get(key):
            out[key] = (before.get(key), after.get(key))
    return out


def differences(old: Mapping[str, Any], new: Mapping[str, Any], runtime: bool) -> list[str]:
    """The changed keys of two dumped configs as "key: old -> new"."""
    return [f"{key}: {before} -> {after}" for key, (before, after) in changed_keys(old, new, runtime).items()]


def name_for(base: str, changes: Mapping[str, Any]) -> str:
    """A name of a run from that of another and the keys changed since: "emoji-lr_0.001-seed_1".

    Args:
        base: The other run's name.
        changes: New values by dotted key; the order does not matter. Many changes are told apart by a digest.
    """
    parts = [f"{key.rpartition('.')[2]}_{value}" for key, value in sorted(changes.items())]
    name = "-".join([base, *(re.sub(r"[^A-Za-z0-9.]+", "_", part).strip("_") for part in parts)])
    digest = hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:8]
    plain = all(re.fullmatch(r"[A-Za-z0-9._+-]*", str(value)) for value in changes.values())
    return name if len(name) <= 80 and plain else f"{name[:60].rstrip('_-.')}-{digest}"


def _runtime_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("runtime"):
            yield prefix + name
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _runtime_keys(field.annotation, f"{prefix}{name}.")


def _texts(value: Any) -> Iterator[str]:
    """All texts within a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
