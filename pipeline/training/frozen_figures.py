"""Figures of the frozen network on the test classes or a validation fold, kept below STORAGE/frozen and shared by all runs that they are of.

    STORAGE/frozen/<digest>.json    {"of": everything that the figures depend on, "metrics": in percent, "sha256": of both}

The digest is that of "of": the images (fingerprint of the store), the network (its weights, not the name of their file), the
pixels of evaluation, the protocol, and what changes the last bits of an embedding: number format, images in a forward pass,
workers, threads, device, versions of libraries. Runs that start at once may each compute the figures: they write the same.
Networks and pixels by code of a user's own, and networks described in a local folder, are not shared: what their name stands
for may change.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from typing import Any

import torch

from methods import plugins
from pipeline.config import Config, ModelConfig
from pipeline.data.store import Store
from pipeline.errors import RunError, UserError, one_line
from pipeline.evaluation.embedder import Embedder
from pipeline.model.timm_backbones import LOCAL
from pipeline.model.trunk import Trunk
from pipeline.storage import Folder

FOLDER = "frozen"
FORMAT = 1  # raised when the same network is measured otherwise
_LIBRARIES = ("torch", "torchvision", "timm")


class FrozenFigures:
    """The file of one network's figures.

    Args:
        storage: Folder of datasets and runs.
        of: Everything that the figures depend on, as JSON.
        measured_on: The images, in words.
    """

    def __init__(self, storage: Folder, of: dict[str, Any], measured_on: str) -> None:
        self.folder, self.of, self.measured_on = storage / FOLDER, of, measured_on
        self.name = f"{_digest(of)}.json"

    def read(self) -> tuple[dict[str, float] | None, str]:
        """The figures, None if they have to be computed; and a line to show, which may be empty."""
        path = f"{self.folder}/{self.name}"
        try:
            if not self.folder.exists(self.name):
                return None, ""
            record = self.folder.read_json(self.name)
            if record != self._record(record["metrics"]):
                raise UserError("its checksum differs")
        except (OSError, RunError, UserError, KeyError, TypeError) as error:
            return None, f"{path} is damaged and computed again ({one_line(error)})"
        return record["metrics"], f"figures of the frozen network on {self.measured_on} taken from {path}"

    def write(self, metrics: dict[str, float]) -> str:
        """Keeps the figures, whole or not at all; returns a line to show if that is not possible, else ""."""
        try:
            self.folder.write_json(self.name, self._record(metrics))
        except (OSError, RunError) as error:
            return f"figures of the frozen network cannot be kept for other runs ({one_line(error)})"
        return ""

    def _record(self, metrics: dict[str, float]) -> dict[str, Any]:
        return {"of": self.of, "metrics": metrics, "sha256": _digest([self.of, metrics])}


def frozen_figures(
    config: Config, store: Store, embedder: Embedder, trunk: Trunk, fold: int | None = None
) -> FrozenFigures | None:
    """Where the figures of a run's untrained trunk are kept; None if they cannot be shared.

    Reads every weight once: 0.1 s for a ResNet-50.

    Args:
        config: Configuration of the run.
        store: The dataset.
        embedder: Embeds its images.
        trunk: The untrained trunk.
        fold: The validation fold that is measured; None: the test classes.
    """
    transforms, evaluation, backbone = config.data.transforms.of_evaluation(), config.evaluation, config.model.backbone
    if transforms.evaluation is not None or plugins.is_import_string(backbone) or backbone.startswith(LOCAL):
        return None
    device = embedder.device
    is_gpu = device.type == "cuda"
    of = {
        "format": FORMAT,
        "images": [store.fingerprint, store.protocol, *([] if fold is None else [f"fold {fold}"])],
        "pixels": transforms.model_dump(mode="json", include={"size", "resize", "squash"}),
        "model": config.model.model_dump(mode="json", exclude=set(ModelConfig.NOT_EMBEDDED - {"channels_last"})),
        "weights": trunk_digest(trunk),
        "evaluation": evaluation.model_dump(
            mode="json", include={"recall_at", "distance", "distractors", "reranking", "batch_size"}
        ),
        "precision": config.precision,
        "deterministic": config.runtime.deterministic,
        "workers": embedder.ranks.world,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if is_gpu else torch.backends.cpu.get_cpu_capability(),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }
    return FrozenFigures(Folder(config.root), of, "the test classes" if fold is None else f"fold {fold}")


def trunk_digest(trunk: Trunk) -> str:
    """SHA-256 of every parameter and buffer, and of the normalisation of its pixels."""
    digest = hashlib.sha256()
    for name, value in {**trunk.state_dict(), "mean": trunk.mean, "std": trunk.std}.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
