"""`raydml.load`: a model from a run, from a folder that was exported, or from the Hugging Face Hub."""

from __future__ import annotations

import torch

from pipeline.errors import UserError, one_line
from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.inference.model_folder import is_model, read_model
from pipeline.inference.trained_model import load_run
from pipeline.model.network import EmbeddingConfig, build_for_embedding
from pipeline.runs.checkpoint import METHOD, TRUNK, Checkpoints
from pipeline.runs.records import is_run
from pipeline.runs.run_folder import CONFIG, SUMMARY, read_values
from pipeline.storage import Folder, home

HUB = "hf://"
OTHER_EXPORT = "export.json"  # in a folder that was exported in another format than safetensors


def load_model(
    source: str, checkpoint: str | int | None = None, device: str | torch.device | None = None
) -> EmbeddingModel:
    """Loads a trained model; its dataset is not needed.

    Args:
        source: Name of a run below the default storage, its folder or s3:// URI; a folder or URI that
            `raydml export` has written; or "hf://OWNER/NAME" (or "hf://OWNER/NAME@REVISION") of one on the Hub.
        checkpoint: Of a run: "best", "last" or a step; None: the run's `evaluation.checkpoint`.
        device: Device of the network; None: CUDA if there is one, else Apple's GPU, else the CPU.

    Raises:
        UserError: There is no such model, it is damaged, or the device does not exist.
    """
    source = str(source)
    where = _device(device)
    if source.startswith(HUB):
        _no_checkpoint(source, checkpoint)
        return read_model(_downloaded(source), where, source)
    candidates = (Folder(source), Folder(home()) / "runs" / source)
    for folder in candidates:
        if is_model(folder):
            _no_checkpoint(source, checkpoint)
            return read_model(folder, where)
        if folder.exists(OTHER_EXPORT):
            exported = folder.read_json(OTHER_EXPORT).get("format")
            raise UserError(
                f"{folder} is a model exported as {exported}, for other programs; raydml.load reads the format safetensors: "
                "python -m pipeline.export RUN --to FOLDER"
            )
        if is_run(folder):
            break
    else:
        raise UserError(
            f"{source!r} is neither a run (no config.yaml there or in {home()}/runs) nor an exported model (no model.json)"
        )
    trained = load_run(source, None if checkpoint is None else str(checkpoint))
    settings = EmbeddingConfig.read(read_values(trained.run), f"{trained.run}/{CONFIG}")
    checkpoints = Checkpoints(trained.run)
    tensors = [checkpoints.tensors(trained.kind, trained.step, name) for name in (TRUNK, METHOD)]
    with checkpoints.fitting(trained.kind, trained.step):
        trunk, head = build_for_embedding(settings, trained.num_classes, where, tensors)
    return EmbeddingModel(
        trained.run.uri,
        settings,
        trunk,
        head,
        where,
        trained.weights(),
        trained.num_classes,
        trained.class_names,
        trained.run.read_json(SUMMARY) if trained.run.exists(SUMMARY) else {},
    )


def _no_checkpoint(source: str, checkpoint: str | int | None) -> None:
    if checkpoint is not None:
        raise UserError(f"{source} is an exported model, which has one checkpoint: leave out checkpoint={checkpoint!r}")


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        made = torch.device(device)
        torch.empty(0, device=made)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = one_line(error).partition(": ")[2].partition(". ")[0]
        raise UserError(f"device {str(device)!r} cannot be used: {reason}") from error
    return made


def _downloaded(source: str) -> Folder:
    """The local copy of a model on the Hub, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = source.removeprefix(HUB).partition("@")
    if repository.count("/") != 1:
        raise UserError(f"{source!r}: expected {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION")
    try:
        folder = Folder(
            snapshot_download(repository, revision=revision or None, allow_patterns=["*.json", "*.safetensors"])
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{source} cannot be downloaded from the Hugging Face Hub ({one_line(error)})") from error
    if not is_model(folder):
        raise UserError(f"{source} is not a model that raydml has exported (no model.json)")
    return folder


__all__ = ["load_model"]
