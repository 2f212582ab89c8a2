"""Writes a trained model for other programs; nothing is left behind unless it computes what the trained model does.

README.md       the model card
export.json     format, files with their SHA-256, input, output, measured differences; safetensors: model.json instead
and by format:
    safetensors     trunk.safetensors, method.safetensors, class_names.json, see `model_folder`
    onnx            model.onnx, with --int8 model.int8.onnx
    torch_export    model.pt2
    timm            config.json, model.safetensors
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.exporting import onnx_files, parity
from pipeline.exporting.hub import check_hub, push
from pipeline.exporting.int8 import Int8Cost, int8_cost, int8_store
from pipeline.exporting.model_card import README, Exported, model_card
from pipeline.exporting.network import DeployedNetwork, refines
from pipeline.exporting.onnx_files import EMBEDDINGS, IMAGES, PIXELS, OnnxNetwork
from pipeline.exporting.preprocessing import Preprocessing
from pipeline.exporting.timm_folder import write_timm
from pipeline.exporting.torch_program import load_program, write_program
from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.inference.load_model import OTHER_EXPORT
from pipeline.inference.model_folder import MODEL, read_model, write_model
from pipeline.storage import Folder

RECORD = OTHER_EXPORT
ONNX, INT8, PROGRAM = "model.onnx", "model.int8.onnx", "model.pt2"
_BEFORE = "preprocessing.onnx"  # beside the folder, until both parts are joined
FORMAT = 1  # of export.json

Format = Literal["safetensors", "onnx", "torch_export", "timm"]
FORMATS: tuple[Format, ...] = ("safetensors", "onnx", "torch_export", "timm")


@dataclass(frozen=True)
class ExportOptions:
    """What is asked for.

    Attributes:
        format: One of FORMATS.
        preprocessing: Resize and centre crop are a part of the network (onnx, torch_export).
        image_size: With preprocessing: height and width of all images; None: any.
        int8: Write an int8 network as well, and measure what it costs (onnx).
        data: Dataset to measure it on; None: the run's.
        trained_on: Address of the run's dataset, if it is known.
        licence: Identifier of a licence, for the model card.
        repository: OWNER/NAME on the Hugging Face Hub, to push to; None: not pushed.
        private: Whether a repository that is made is private.
    """

    format: Format = "safetensors"
    preprocessing: bool = False
    image_size: tuple[int, int] | None = None
    int8: bool = False
    data: str | None = None
    trained_on: str | None = None
    licence: str = "unknown"
    repository: str | None = None
    private: bool = False

    def check(self, target: Folder) -> None:
        """Raises UserError if they do not go together, or the folder or the Hub cannot be written to."""
        if self.preprocessing and self.format not in ("onnx", "torch_export"):
            raise UserError(
                f"--preprocessing goes with --format onnx or torch_export, not with {self.format}, which holds weights only"
            )
        if self.image_size is not None and (not self.preprocessing or min(self.image_size) < 1):
            raise UserError(
                f"--image-size {' '.join(map(str, self.image_size))}: expected two numbers of at least 1, and --preprocessing"
            )
        if self.int8 and self.format != "onnx":
            raise UserError(f"--int8 goes with --format onnx, not with {self.format}")
        if self.data is not None and not self.int8:
            raise UserError("--data is what --int8 is measured on: add --int8, or leave it out")
        if self.format == "onnx":
            onnx_files.check_installed()
        if self.repository is not None:
            check_hub(self.repository)
        if target.names():
            raise UserError(f"{target} is not empty: choose another folder, or remove it")
        target.check_writable()


def export_model(
    model: EmbeddingModel, target: Folder, options: ExportOptions, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Exports a model into an empty folder; returns the content of export.json.

    Args:
        model: The trained model, on the CPU; its figures are written into the card.
        target: The folder.
        options: The format, and what else.
        say: Shows a line to the user: measured differences, files.

    Raises:
        UserError: As `ExportOptions.check`; the network cannot be exported so.
        RunError: The exported network differs from the model; the Hub cannot be reached. In the first case nothing is written.
    """
    is_new = not target.exists()
    options.check(target)
    try:
        with tempfile.TemporaryDirectory(prefix="raydml-export-") as name:
            folder = Path(name) / "model"
            folder.mkdir()
            record = _write(model, folder, options, say)
            last = MODEL if options.format == "safetensors" else RECORD
            names = sorted((path.name for path in folder.iterdir()), key=lambda file: (file == last, file))
            target.write_together({file: (folder / file).read_bytes() for file in names})
            say(f"written: {target} ({', '.join(names)})")
            if options.repository is not None:
                say(f"pushed: {push(folder, options.repository, options.private)}")
    except BaseException:
        if is_new and not target.names():
            target.remove()
        raise
    return record


def _write(model: EmbeddingModel, folder: Path, options: ExportOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes all files into an empty local folder; returns the record."""
    export = _Export(model, folder, options, say)
    writers = {
        "safetensors": export.write_safetensors,
        "onnx": export.write_onnx,
        "torch_export": export.write_torch_export,
        "timm": export.write_timm,
    }
    exported = writers[options.format]()
    record = export.record()
    (folder / README).write_text(model_card(model, exported, options.licence, options.repository), encoding="utf-8")
    if options.format != "safetensors":
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


class _Export:
    """One export into a local folder: each format checks what it has written and describes it."""

    def __init__(self, model: EmbeddingModel, folder: Path, options: ExportOptions, say: Callable[[str], None]) -> None:
        self.model, self.folder, self.options, self.say = model, folder, options, say
        self.what = f"backbone {model.settings.model.backbone!r}"
        self.size = (model.transforms.size, model.transforms.size)
        self.measured: dict[str, Any] = {}
        self.store = int8_store(model.config, options.data, options.trained_on) if options.int8 else None
        self.notes: list[str] = []
        if refines(model):
            self.notes.append(
                "The figures are of embeddings that were refined by looking at all test images together (method.inference); a "
                "network of single images does not do that, and its figures are others."
            )
        if model.settings.precision == "bf16":
            self.notes.append("Trained in bfloat16; the exported network computes in float32.")

    def record(self) -> dict[str, Any]:
        """The content of export.json."""
        model, files = self.model, [path for path in sorted(self.folder.iterdir()) if path.name not in (README, RECORD)]
        return {
            "format": self.options.format,
            "version": FORMAT,
            "raydml": importlib.metadata.version("raydml"),
            "name": model.name,
            "fingerprint": model.fingerprint,
            "weights": model.weights,
            "dim": model.dim,
            "distance": model.distance,
            "input": self._input(),
            "transforms": model.transforms.model_dump(mode="json", include={"size", "resize", "squash", "evaluation"}),
            "classes": model.classes,
            "measured": self.measured,
            "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        }

    def write_safetensors(self) -> Exported:
        folder = Folder(self.folder)
        write_model(self.model, folder)
        loaded = read_model(folder, torch.device("cpu"))
        self._embeddings(loaded.embed_pixels, "the written folder")
        address = f"hf://{self.options.repository}" if self.options.repository else "FOLDER"
        usage = (
            "import raydml",
            "",
            f'model = raydml.load("{address}")',
            'embeddings = model.embed("photos/")  # [N, D]',
        )
        return self._exported(usage, [f"weights and {MODEL}, which `raydml.load` reads; preprocessing is a part of it"])

    def write_onnx(self) -> Exported:
        """The network of pixels; with preprocessing, that before it in the same file."""
        network = DeployedNetwork(self.model)
        plain = self.folder.parent / "pixels.onnx"
        self.say("exporting to ONNX ...")
        onnx_files.write_onnx(
            network,
            parity.made_images(2, *self.size),
            plain,
            (PIXELS, EMBEDDINGS),
            ("batch", None, None, None),
            self.what,
        )
        self._embeddings(OnnxNetwork(plain), "the ONNX network", network)
        self._finish_onnx(plain, ONNX)
        if self.options.preprocessing:
            whole, before = OnnxNetwork(self.folder / ONNX), OnnxNetwork(self.folder.parent / _BEFORE)
            self._embeddings(whole, "the ONNX network with preprocessing", network, before)
        cost = None if self.store is None else self._int8(plain, self.store)
        name = IMAGES if self.options.preprocessing else PIXELS
        usage = (
            "import onnxruntime",
            "",
            f'session = onnxruntime.InferenceSession("{ONNX}")',
            f'embeddings = session.run(None, {{"{name}": images}})[0]  # images: numpy uint8 {self._shape()}',
        )
        facts = [f"{ONNX}: opset {onnx_files.OPSET}"]
        if cost is not None:
            facts += [f"{INT8}: weights of one byte; {line}" for line in cost.lines]
        return self._exported(usage, facts)

    def write_torch_export(self) -> Exported:
        preprocessing = self._preprocessing()
        network = DeployedNetwork(self.model, preprocessing)
        height, width = self.options.image_size or (self.size[0] + 3, self.size[1] + 8)
        example = parity.made_images(2, *((height, width) if preprocessing is not None else self.size))
        free = ("batch", None, *(("height", "width") if self._any_size() else (None, None)))
        path = self.folder / PROGRAM
        self.say("exporting with torch.export ...")
        write_program(network, example, path, free, self.what)
        self._embeddings(load_program(path), "the exported program", DeployedNetwork(self.model), preprocessing)
        if preprocessing is not None:
            self._pixels(preprocessing)
        usage = (
            "import torch",
            "",
            f'network = torch.export.load("{PROGRAM}").module()',
            f"embeddings = network(images)  # images: torch.uint8 {self._shape()}",
        )
        return self._exported(
            usage, [f"{PROGRAM}: a program of torch.export, PyTorch {torch.__version__.partition('+')[0]}"]
        )

    def write_timm(self) -> Exported:
        pooled, difference = write_timm(self.model, self.folder)
        self.measured["max_difference"] = parity.check(difference, parity.BOUND, "the timm model")
        self.say(f"the timm model: max difference {difference:.2g} (at most {parity.BOUND:g})")
        gives = "the pooled features of the trunk" if pooled else "the last map or tokens, before the pooling"
        self.notes.append(
            f"The timm model is the backbone alone: it gives {gives}, not the embedding, for which the method's head is needed "
            "(format safetensors)."
        )
        usage = (
            "import timm",
            "",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()'
            if self.options.repository is None
            else f'model = timm.create_model("hf-hub:{self.options.repository}", pretrained=True).eval()',
            "features = model(images)  # float32 [B, 3, S, S], normalised by model.pretrained_cfg's mean and std",
        )
        return self._exported(usage, ["config.json and model.safetensors, which `timm.create_model` reads"])

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _preprocessing(self) -> Preprocessing | None:
        return Preprocessing(self.model.transforms, self.options.image_size) if self.options.preprocessing else None

    def _any_size(self) -> bool:
        return self.options.preprocessing and self.options.image_size is None

    def _finish_onnx(self, plain: Path, name: str) -> None:
        """Puts a network of pixels into the folder, behind the preprocessing if that is asked for."""
        preprocessing = self._preprocessing()
        if preprocessing is None:
            (self.folder / name).write_bytes(plain.read_bytes())
            return
        before = self.folder.parent / _BEFORE
        if not before.exists():
            height, width = self.options.image_size or (self.size[0] + 3, self.size[1] + 8)
            free = ("batch", None, *(("height", "width") if self._any_size() else (None, None)))
            onnx_files.write_onnx(
                preprocessing, parity.made_images(2, height, width), before, (IMAGES, PIXELS), free, "the preprocessing"
            )
            self._pixels(OnnxNetwork(before))
        onnx_files.join(before, plain, self.folder / name)

    def _int8(self, plain: Path, store: Store) -> Int8Cost:
        small = self.folder.parent / "pixels.int8.onnx"
        onnx_files.write_int8(plain, small)
        self.say("measuring the int8 network ...")
        cost = int8_cost(self.model.config, store, plain, small)
        for line in cost.lines:
            self.say(line)
        self._finish_onnx(small, INT8)
        self.measured["int8"] = {
            "dataset": cost.dataset, "images": cost.images, "float32": cost.metrics[0], "int8": cost.metrics[1],
            "bytes": list(cost.num_bytes), "images_per_second": [round(rate, 2) for rate in cost.rates],
        }  # fmt: skip
        return cost

    def _embeddings(
        self, network: Any, what: str, float32: nn.Module | None = None, preprocess: nn.Module | None = None
    ) -> None:
        """Compares with the trained model; of a run in bf16, whose rounding is larger than any bound, with its float32 network.

        Args:
            network: What was exported.
            what: What it is, for an error.
            float32: The network in float32; None: the exported network computes in the model's own precision.
            preprocess: The preprocessing inside it, by the same runtime: its rounding is compared by itself.
        """
        bf16 = self.model.settings.precision == "bf16"
        embed: Any = float32 if bf16 and float32 is not None else self.model.embed_pixels
        shorter = self.model.transforms.resize or self.size[0]
        size = self.size if preprocess is None else self.options.image_size or (shorter, shorter)
        images = parity.batches(size)

        def reference(batch: Tensor) -> Tensor:
            found: Tensor = embed(batch if preprocess is None else preprocess(batch))
            return found

        difference = parity.check(parity.embedding_difference(network, reference, images), parity.BOUND, what)
        self.measured["max_difference"] = max(difference, self.measured.get("max_difference", 0.0))
        num = sum(map(len, images))
        self.say(f"{what}: max difference {difference:.2g} on {num} images (at most {parity.BOUND:g})")

    def _pixels(self, preprocess: Any) -> None:
        sizes = [self.options.image_size] if self.options.image_size else parity.sizes_to_try(self.model.transforms)
        difference = parity.pixel_difference(preprocess, self.model.transforms, sizes)
        parity.check(float(difference), parity.PIXEL_BOUND, "a pixel of the preprocessing in the network")
        self.measured["max_pixel_difference"] = difference
        self.say(f"preprocessing: max difference {difference} of 255 (at most {parity.PIXEL_BOUND:g})")

    def _shape(self) -> str:
        height, width = self.options.image_size or self.size
        return "[B, 3, H, W]" if self._any_size() else f"[B, 3, {height}, {width}]"

    def _input(self) -> dict[str, Any]:
        if self.options.format == "timm":
            return {
                "dtype": "float32",
                "shape": f"[B, 3, {self.size[0]}, {self.size[1]}]",
                "colours": "RGB, normalised",
            }
        return {
            "dtype": "uint8",
            "shape": self._shape(),
            "colours": "RGB",
            "preprocessing": self.options.preprocessing or self.options.format == "safetensors",
        }

    def _exported(self, usage: Sequence[str], facts: Sequence[str]) -> Exported:
        t = self.model.transforms
        made = (
            f"squashed to {t.size}×{t.size}" if t.squash
            else f"bicubic, antialiased, shorter side {t.resize or t.size}, centre crop {t.size}×{t.size}"
        )  # fmt: skip
        inputs = [f"input: RGB, {self._input()['dtype']} {self._shape()}, any number of images"]
        if self._input().get("preprocessing"):
            inputs.append(f"preprocessing is inside: {made}")
        else:
            inputs.append(f"preprocessing is not inside: {t.evaluation or made}; normalisation is"
                          if self.options.format != "timm" else f"preprocessing is not inside: {made}, then normalisation")  # fmt: skip
        output = f"output: float32 [B, {self.model.dim}]"
        measured = f"largest difference to the trained model: {self.measured['max_difference']:.2g}"
        return Exported(
            self.options.format, tuple(usage),
            (*facts, *inputs, *([] if self.options.format == "timm" else [output]), measured), tuple(self.notes),
        )  # fmt: skip


__all__ = ["FORMATS", "ExportOptions", "export_model"]
