"""A model as a folder of its own, which needs neither run nor dataset: `raydml.load(FOLDER)` reads it.

model.json           format, name, config, number of classes, figures, SHA-256 of the other files; written last
class_names.json     names of the training classes by label
trunk.safetensors    weights of backbone and pooling
method.safetensors   weights of the head (and of what else the method trains)
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from pipeline.errors import UserError, joined_lines
from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.model.network import EmbeddingConfig, build_for_embedding
from pipeline.runs.checkpoint import METHOD, TRUNK, cpu_tensors
from pipeline.runs.run_folder import CLASS_NAMES
from pipeline.storage import Folder

MODEL = "model.json"
FORMAT = 1
# Sections of a run's configuration that say where and how it ran; they are not published with a model.
_LEFT_OUT = ("storage", "runtime", "cache", "checkpoint", "mining")


def write_model(model: EmbeddingModel, folder: Folder) -> list[str]:
    """Writes a model into an empty folder; returns the names of its files.

    Raises:
        UserError: The folder is not empty, or cannot be written.
        RunError: The disk is full.
    """
    if folder.names():
        raise UserError(f"{folder} is not empty: choose another folder, or remove it")
    folder.check_writable()
    files = {
        TRUNK: save_safetensors(cpu_tensors(model.trunk)),
        METHOD: save_safetensors(cpu_tensors(model.method)),
        CLASS_NAMES: json.dumps(model.class_names).encode(),
    }
    folder.write_together(files)
    config = _published(model.settings.values)
    folder.write_json(
        MODEL,
        {
            "format": FORMAT,
            "raydml": importlib.metadata.version("raydml"),
            "name": model.name,
            "config": config,
            "classes": model.classes,
            "dim": model.dim,
            "figures": model.figures,
            "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        },
    )
    return [MODEL, *files]


def _published(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what is of this machine alone: folders are cut to their names."""
    config = {key: value for key, value in values.items() if key not in _LEFT_OUT}
    data, network = dict(config["data"]), dict(config["model"])
    data["source"] = str(data["source"]).rstrip("/").rpartition("/")[2]
    if os.path.isabs(str(network["weights"])) or "://" in str(network["weights"]):
        network["weights"] = str(network["weights"]).rpartition("/")[2]
    return config | {"data": data, "model": network}


def is_model(folder: Folder) -> bool:
    """True if a folder contains a model that `write_model` wrote."""
    return folder.exists(MODEL)


def read_model(folder: Folder, device: torch.device, source: str | None = None) -> EmbeddingModel:
    """The model of a folder.

    Args:
        folder: The folder.
        device: Device of the network.
        source: What the model is said to be loaded from; None: the folder.

    Raises:
        UserError: A file is missing, damaged or of another version, or the weights do not fit.
    """
    record = folder.read_json(MODEL)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise UserError(
            f"{folder}/{MODEL} has format {found}, this version reads {FORMAT}: use the version that wrote it"
        )
    files = {name: _read(folder, name, checksum) for name, checksum in record["sha256"].items()}
    settings = EmbeddingConfig.read(record["config"], f"{folder}/{MODEL}")
    try:
        tensors = load_safetensors(files[TRUNK]), load_safetensors(files[METHOD])
        trunk, method = build_for_embedding(settings, int(record["classes"]), device, tensors)
    except (RuntimeError, SafetensorError, KeyError) as error:
        raise UserError(f"{folder}: its weights do not fit the network of {MODEL}: {joined_lines(error)}") from error
    return EmbeddingModel(
        source or folder.uri,
        settings,
        trunk,
        method,
        device,
        {name: record["sha256"][name] for name in (TRUNK, METHOD)},
        int(record["classes"]),
        tuple(json.loads(files[CLASS_NAMES])),
        record["figures"],
    )


def _read(folder: Folder, name: str, checksum: str) -> bytes:
    data = folder.read(name) if folder.exists(name) else None
    if data is None or hashlib.sha256(data).hexdigest() != checksum:
        problem = "is missing" if data is None else "is damaged (its checksum differs)"
        raise UserError(f"{folder}/{name} {problem}: copy the folder again, or export the run again")
    return data


__all__ = ["is_model", "read_model", "write_model"]
