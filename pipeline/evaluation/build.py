"""A run's network and embedder, built from the configuration, for training, inference and checks."""

from __future__ import annotations

import torch

from methods import Method, method_class
from pipeline.config import Config
from pipeline.data.loader import ImageSource
from pipeline.data.store import Samples, Store
from pipeline.distributed.collectives import Ranks
from pipeline.evaluation.embedder import Embedder
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
        UserError: As `build_trunk`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        trunk = build_trunk(config.model, config.data.transforms.size)
        method = build_method(config, trunk.features, classes)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    return trunk.to(device, dtype), method.to(device, dtype)


def build_embedder(
    config: Config, store: Store, device: torch.device, ranks: Ranks, loader: str, loader_cpus: int
) -> Embedder:
    """An embedder of a store's images with the transforms of evaluation, read without the cache.

    Args:
        config: The run's configuration.
        store: The dataset.
        device: Device of trunk and method.
        ranks: The ranks that share the work.
        loader: "ray" or "in_process".
        loader_cpus: CPUs of a Ray Data pipeline.
    """
    source = ImageSource(store.folder.uri, store.fingerprint, None, config.data.transforms)
    return Embedder(source, loader, loader_cpus, config.evaluation.batch_size, config.precision, device, ranks)
