"""The weights of another run to start from: its trunk, and its head (`model.weights: RUN`)."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.runs.checkpoint import METHOD, TRUNK, Checkpoints
from pipeline.runs.checkpoint_choice import checkpoint_title, choose_checkpoint
from pipeline.runs.records import is_run
from pipeline.storage import Folder, home

BACKBONE, HEAD = "backbone.", "head."


def run_of(weights: str) -> Folder | None:
    """The run that `model.weights` names: its folder, URI, or name below the default storage; None: it names no run."""
    return next((folder for folder in (Folder(weights), Folder(home()) / "runs" / weights) if is_run(folder)), None)


def backbone_tensors(run: Folder) -> tuple[dict[str, Tensor], str]:
    """The backbone's tensors in a run's checkpoint, and a line about them.

    Raises:
        UserError: The run has no checkpoint, or it is damaged.
    """
    kind, step = choose_checkpoint(run)
    tensors = Checkpoints(run).tensors(kind, step, TRUNK)
    found = {name.removeprefix(BACKBONE): t for name, t in tensors.items() if name.startswith(BACKBONE)}
    return found, f"weights of the {checkpoint_title(kind, step)} of run {run}"


def load_head(config: ModelConfig, head: nn.Module) -> None:
    """Loads the head of the run that `model.weights` names, if it names one and `model.weights_of` asks for the head.

    Raises:
        UserError: It does not fit.
    """
    run = run_of(config.weights) if config.weights_of == "trunk+head" else None
    if run is None:
        return
    tensors = Checkpoints(run).tensors(*choose_checkpoint(run), METHOD)
    found = {name.removeprefix(HEAD): t for name, t in tensors.items() if name.startswith(HEAD)}
    wanted = {name: tuple(t.shape) for name, t in head.state_dict().items()}
    shapes = {name: tuple(t.shape) for name, t in found.items()}
    if shapes != wanted:
        raise UserError(
            f"the head of run {run} has {_listed(shapes)}, this run's has {_listed(wanted)}: set method.embedding_dim and method.head as "
            "there, or model.weights_of to trunk"
        )
    head.load_state_dict(found)


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(shapes.items())) or "no tensors"
