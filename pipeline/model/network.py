"""A run's network, trunk and method, built from the configuration: for training, inference and checks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods import METHODS, Method, MethodConfig, method_class
from methods.head import HeadConfig
from pipeline.config import Config, EvaluationConfig, ModelConfig, build_config
from pipeline.data.store import Samples
from pipeline.data.transforms import TransformConfig
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError, joined_lines
from pipeline.model.run_weights import load_head
from pipeline.model.trunk import Trunk, build_trunk


def num_classes(samples: Samples) -> int:
    """Number of classes of a training set, whose labels are 0, 1, ..."""
    return int(samples.labels.max()) + 1


def build_method(config: Config, features: int, classes: int) -> Method:
    """The configured method on the CPU.

    Args:
        config: The run's configuration.
        features: Width F of the trunk's pooled features.
        classes: Number of training classes.
    """
    return method_class(config.method.name)(config.method, features, classes)


def build_network(config: Config, classes: int, device: torch.device) -> tuple[Trunk, Method]:
    """Trunk and method in the run's precision, with the same initial weights on every rank.

    Args:
        config: The run's configuration.
        classes: Number of training classes.
        device: Device of the weights.

    Raises:
        UserError: As `build_trunk` and `load_head`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        trunk = build_trunk(config.model, config.data.transforms.size)
        method = build_method(config, trunk.features, classes)
    load_head(config.model, method.head)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    return trunk.to(device, dtype), method.to(device, dtype)


def untrained(config: Config) -> Config:
    """The configuration whose network starts at random: for weights that are loaded afterwards."""
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": "none"})})


@dataclass(frozen=True)
class EmbeddingConfig:
    """The part of a run's configuration that embeds an image, read without what only trains.

    Attributes:
        values: The whole resolved configuration.
        name: Name of the run.
        model: The trunk.
        transforms: Preprocessing.
        evaluation: Distance, checkpoint, batch size.
        precision: Number format.
        method, dim: Name of the method, and dimension D of its embeddings.
        head: Layers of the method's head.
    """

    values: Mapping[str, Any]
    name: str
    model: ModelConfig
    transforms: TransformConfig
    evaluation: EvaluationConfig
    precision: str
    method: str
    dim: int
    head: HeadConfig

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> EmbeddingConfig:
        """The configuration in the values of a config.yaml.

        Args:
            values: The values.
            where: The file, for errors.

        Raises:
            UserError: A key is missing, or is one that this version does not accept.
        """
        try:
            return cls(
                values,
                str(values["name"]),
                ModelConfig.model_validate(values["model"]),
                TransformConfig.model_validate(values["data"]["transforms"]),
                EvaluationConfig.model_validate(values["evaluation"]),
                str(values["precision"]),
                str(values["method"]["name"]),
                int(values["method"]["embedding_dim"]),
                HeadConfig.model_validate(values["method"].get("head") or {}),  # absent in runs of earlier versions
            )
        except (KeyError, TypeError, ValueError) as error:
            problem = f"no key {error}" if isinstance(error, KeyError) else joined_lines(error)
            raise UserError(f"{where} is not a configuration that this version accepts ({problem})") from error

    @functools.cached_property
    def whole(self) -> Config:
        """The whole configuration, checked.

        Raises:
            UserError: This version does not accept it.
        """
        return build_config(self.values)


def build_for_embedding(
    config: EmbeddingConfig, classes: int, device: torch.device, tensors: Sequence[Mapping[str, Tensor]]
) -> tuple[Trunk, Method]:
    """Trunk and method with their weights, in evaluation mode; of a method that only its head embeds for, that alone.

    What only trains (losses, proxies, graph networks, and the libraries that they are made with) is left out.

    Args:
        config: The configuration.
        classes: Number of training classes.
        device: Device of the weights.
        tensors: Weights of the trunk and of the method, by name.

    Raises:
        RuntimeError: The weights do not fit.
    """
    with _one_thread():
        trunk = build_trunk(config.model.model_copy(update={"weights": "none"}), config.transforms.size)
    kind = METHODS.get(config.method)
    of_trunk, of_method = tensors
    if kind is not None and kind.embed is Method.embed:
        settings = MethodConfig(name=config.method, embedding_dim=config.dim, head=config.head)
        method = Method(settings, trunk.features, classes)
        of_method = {name: tensor for name, tensor in of_method.items() if name.startswith("head.")}
    else:
        method = build_method(config.whole, trunk.features, classes)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    trunk, method = trunk.to(device, dtype), method.to(device, dtype)  # before loading, which rounds to what is there
    trunk.load_state_dict(of_trunk)
    method.load_state_dict(of_method)
    trunk.set_mode(False, Ranks())
    method.eval()
    return trunk, method


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A block whose passes over a single image are computed by one thread: more of them would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trunk_features(trunk: Callable[[Tensor], Tensor], pixels: Tensor, precision: str) -> Tensor:
    """Pooled features in at least float32, with the run's precision inside the trunk."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = trunk(pixels)
    return features if features.dtype == torch.float64 else features.float()
