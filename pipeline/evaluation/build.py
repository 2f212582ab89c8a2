"""A run's network, and what embeds with it, made from the configuration: in training, in inference and in checks alike."""

from __future__ import annotations

import torch

from methods import METHODS, Method
from pipeline.config import Config
from pipeline.data.loader import ImageSource
from pipeline.data.store import Samples, Store
from pipeline.distributed.collectives import Ranks
from pipeline.evaluation.embedder import Embedder
from pipeline.model.trunk import Trunk, build_trunk


def build_method(config: Config, features: int, samples: Samples) -> Method:
    """The configured method on the CPU, for the classes of the training samples.

    Args:
        config: of the run.
        features: width F of the trunk's pooled features.
        samples: the training set.
    """
    return METHODS[config.method.name](config.method, features, int(samples.labels.max()) + 1)


def build_network(config: Config, samples: Samples, device: torch.device) -> tuple[Trunk, Method]:
    """Trunk and method in the run's precision, with the same initial weights on every rank.

    Args:
        config: of the run.
        samples: the training set.
        device: of the weights.

    Raises:
        UserError: as `build_trunk`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        trunk = build_trunk(config.model, config.data.transforms.size)
        method = build_method(config, trunk.features, samples)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    return trunk.to(device, dtype), method.to(device, dtype)


def build_embedder(
    config: Config, store: Store, device: torch.device, ranks: Ranks, loader: str, loader_cpus: int
) -> Embedder:
    """Embeds images of a store as evaluation sees them, read without the cache.

    Args:
        config: of the run.
        store: where the images are.
        device: of trunk and method.
        ranks: who shares the work.
        loader: "ray" or "in_process".
        loader_cpus: CPUs of a Ray Data pipeline.
    """
    source = ImageSource(store.folder.uri, store.fingerprint, None, config.data.transforms)
    return Embedder(source, loader, loader_cpus, config.evaluation.batch_size, config.precision, device, ranks)
