"""Networks as ONNX files: written by PyTorch's exporter, joined, made int8, and run by ONNX Runtime.

The opset is 18, which runtimes of 2023 and later read. The number of images is free, and that of their pixels where the
preprocessing is a part of the network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError, joined_lines

OPSET = 18
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
LARGEST = 2**31 - 2**20  # bytes of a file, whose format has 32-bit lengths
IMAGES, PIXELS, EMBEDDINGS = "images", "pixels", "embeddings"


def check_installed() -> None:
    """Raises UserError, with what to install, unless ONNX files can be written and run."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX files need {', '.join(missing)}: pip install 'raydml[export]'")


def write_onnx(
    network: nn.Module, example: Tensor, path: Path, names: tuple[str, str], free: Sequence[str | None], what: str
) -> None:
    """Exports a module of one tensor.

    Args:
        network: The module, in evaluation mode.
        example: An input, of two images.
        path: The file.
        names: Names of input and output.
        free: The name of every axis of the input whose length is free; None: as in the example.
        what: What is exported, for an error.

    Raises:
        UserError: The network cannot be exported, or is too large for a file.
    """
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    if size > LARGEST:
        raise UserError(
            f"{what} has {size / 1e9:.1f} GB of weights, an ONNX file at most 2 GB: use --format safetensors or torch_export"
        )
    axes = {axis: torch.export.Dim(name) for axis, name in enumerate(free) if name is not None}
    try:
        with quiet():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=(axes,),
                input_names=[names[0]],
                output_names=[names[1]],
                opset_version=OPSET,
                verbose=False,
            )
            assert program is not None
            shape: Any = program.model.graph.inputs[0].shape
            fixed = [name for axis, name in enumerate(free) if name is not None and isinstance(shape[axis], int)]
            if fixed:  # the exporter takes the example's length where the network allows no other
                raise ValueError(f"it takes inputs of one {' and one '.join(fixed)} only")
            program.save(path)
    except Exception as error:  # whatever the exporter raises of a network that it cannot trace
        raise UserError(
            f"{what} cannot be exported to ONNX: {root_cause(error)}; --format safetensors takes any"
        ) from error


def root_cause(error: BaseException) -> str:
    """The first lines of the error that began it, at most 300 characters."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = joined_lines(error) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def join(first: Path, second: Path, path: Path) -> None:
    """Writes a network of the first, whose output is the input of the second, and the second."""
    import onnx
    from onnx import compose

    before = compose.add_prefix(onnx.load(first), "preprocessing/", rename_inputs=False, rename_outputs=False)
    after = onnx.load(second)
    output, entry = before.graph.output[0].name, after.graph.input[0].name
    joined = compose.merge_models(before, after, io_map=[(output, entry)])
    onnx.checker.check_model(joined)
    onnx.save(joined, path)


def write_int8(source: Path, path: Path) -> None:
    """Makes the weights of matrix products and convolutions int8, a scale a channel; activations are scaled when it runs.

    The integers are unsigned: products of signed ones saturate on CPUs without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared")
    try:
        with quiet():
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_dynamic(str(prepared), str(path), per_channel=True, weight_type=QuantType.QUInt8)
    except Exception as error:  # whatever the library raises of an operator that it does not know
        raise UserError(f"the network cannot be made int8: {root_cause(error)}; leave out --int8") from error
    finally:
        prepared.unlink(missing_ok=True)


class OnnxNetwork(nn.Module):
    """An ONNX file that ONNX Runtime runs on the CPU; called like the network that it was exported from.

    Args:
        path: The file.
        threads: Threads of an operator; None: all cores.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        self.name = self.session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        given = images.cpu() if len(images) else torch.zeros(1, *images.shape[1:], dtype=images.dtype)  # no empty batch
        return torch.from_numpy(self.session.run(None, {self.name: given.numpy()})[0])[: len(images)]

    def set_mode(self, training: bool, ranks: Any) -> None:
        """As a trunk's, for an embedder: there is evaluation only."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block without the warnings and log lines of exporters, which are about their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
