"""Networks as programs of torch.export: `torch.export.load("model.pt2").module()(images)`, without this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.exporting.onnx_files import quiet, root_cause


def write_program(network: nn.Module, example: Tensor, path: Path, free: Sequence[str | None], what: str) -> None:
    """Exports a module of one tensor; arguments as those of `write_onnx`.

    Raises:
        UserError: The network cannot be exported.
    """
    axes = {axis: torch.export.Dim(name) for axis, name in enumerate(free) if name is not None}
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(network, (example,), dynamic_shapes=(axes,), strict=False)
            torch.export.save(program, path)
    except Exception as error:  # whatever the exporter raises of a network that it cannot trace
        raise UserError(
            f"{what} cannot be exported by torch.export: {root_cause(error)}; --format safetensors takes any"
        ) from error


def load_program(path: Path) -> nn.Module:
    return torch.export.load(path).module()
