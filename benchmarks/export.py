"""Exported networks beside the trained model: differences, sizes and speed.

    python -m benchmarks.export [--backbone NAME ...] [--json PATH]

Each backbone with a head of 128 dimensions, 224 × 224 pixels: the ONNX network in ONNX Runtime against PyTorch, preprocessing
inside the network against the pipeline's own, and the network of int8 weights (dynamic quantisation), on one thread. EfficientNet-Lite0
with its ImageNet weights, the others at random. 3 minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.table import Row, finish
from pipeline.config import build_config
from pipeline.config_model import LITE0
from pipeline.distributed.collectives import Ranks
from pipeline.exporting.int8 import images_per_second
from pipeline.exporting.network import DeployedNetwork
from pipeline.exporting.onnx_files import EMBEDDINGS, IMAGES, PIXELS, OnnxNetwork, join, write_int8, write_onnx
from pipeline.exporting.parity import (
    BOUND,
    PIXEL_BOUND,
    batches,
    embedding_difference,
    made_images,
    pixel_difference,
    sizes_to_try,
)
from pipeline.exporting.preprocessing import Preprocessing
from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.model.network import EmbeddingConfig, build_network
from pipeline.model.trunk import Trunk

LITE = "tf_efficientnet_lite0"
BACKBONES = (LITE, "resnet50", "vit_tiny_patch16_224")
SIZE, RESIZE = 224, 256


def made_model(backbone: str) -> EmbeddingModel:
    """A network with the weights that can be had without a download; else at random, such that its embeddings tell images apart."""
    lite = backbone == LITE
    config = build_config(
        {
            "name": backbone,
            "data": {"transforms": {"size": SIZE, "resize": RESIZE}},
            "model": {"backbone": backbone, "weights": LITE0 if lite else "none"},
        }
    )
    trunk, method = build_network(config, 10, torch.device("cpu"))
    if not lite:
        take_statistics(trunk)
    trunk.set_mode(False, Ranks())
    settings = EmbeddingConfig.read(config.model_dump(mode="json"), backbone)
    model = EmbeddingModel(backbone, settings, trunk, method.eval(), torch.device("cpu"), {}, 10)
    embeddings = model.embed_pixels(made_images(8, SIZE, SIZE))
    if float((embeddings @ embeddings.T).min()) > 0.9999:
        raise RuntimeError(f"{backbone} embeds all images alike: their differences would say nothing")
    return model


@torch.no_grad()
def take_statistics(trunk: Trunk) -> None:
    """Scales of batch normalisation at random, where some start at 0, and statistics of images, as a trained network has them."""
    generator = torch.Generator().manual_seed(0)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average over the batches
            module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
    trunk.train()
    for seed in range(4):
        trunk(made_images(8, SIZE, SIZE, seed))


def rows_of(backbone: str, folder: Path) -> list[Row]:
    """The figures of one backbone."""
    model = made_model(backbone)
    plain, small, whole = (folder / f"{backbone}.{kind}.onnx" for kind in ("pixels", "int8", "images"))
    network = DeployedNetwork(model)
    write_onnx(network, made_images(2, SIZE, SIZE), plain, (PIXELS, EMBEDDINGS), ("batch", None, None, None), backbone)
    write_int8(plain, small)
    difference = embedding_difference(OnnxNetwork(plain), model.embed_pixels, batches((SIZE, SIZE)))
    table = [
        Row(f"{backbone}: ONNX, max difference", difference, promised=f"<= {BOUND:g}", ok=difference <= BOUND),
    ]
    before = folder / "preprocessing.onnx"
    if not before.exists():
        preprocessing = Preprocessing(model.transforms)
        free = ("batch", None, "height", "width")
        write_onnx(preprocessing, made_images(2, 230, 250), before, (IMAGES, PIXELS), free, "the preprocessing")
        sizes = [*sizes_to_try(model.transforms), (1, 1), (480, 640), (1500, 1001), (40, 700)]
        pixels = pixel_difference(OnnxNetwork(before), model.transforms, sizes)
        limit = f"<= {PIXEL_BOUND:g}"
        table.append(Row("preprocessing in the network, of 255", pixels, promised=limit, ok=pixels <= PIXEL_BOUND))
    join(before, plain, whole)
    difference = embedding_difference(
        OnnxNetwork(whole), lambda images: model.embed_pixels(images[:, :, 16:240, 16:240]), batches((RESIZE, RESIZE))
    )
    table.append(Row(f"{backbone}: with preprocessing", difference, promised=f"<= {BOUND:g}", ok=difference <= BOUND))
    torch.set_num_threads(1)
    ours, torch_rate = (
        images_per_second(OnnxNetwork(plain, threads=1), SIZE),
        images_per_second(model.embed_pixels, SIZE),
    )
    table.append(Row(f"{backbone}: images/s, ONNX Runtime and PyTorch", ours, torch_rate, ours / torch_rate))
    int8 = images_per_second(OnnxNetwork(small, threads=1), SIZE)
    table.append(Row(f"{backbone}: images/s, int8 and float", int8, ours, int8 / ours))
    sizes_mb = [path.stat().st_size / 1e6 for path in (small, plain)]
    table.append(Row(f"{backbone}: MB, int8 and float", *sizes_mb, sizes_mb[0] / sizes_mb[1]))
    return table


def rows(backbones: Sequence[str] = BACKBONES) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        return [row for backbone in backbones for row in rows_of(backbone, Path(folder))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=BACKBONES, help=f"(default: {' '.join(BACKBONES)})")
    parser.add_argument("--json", metavar="PATH", help="write the figures into this file as well")
    options = parser.parse_args()
    return finish(rows(options.backbone), options.json)


if __name__ == "__main__":
    sys.exit(main())
