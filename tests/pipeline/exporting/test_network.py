"""The deployed network: of every method, in every precision; what it is compared with; networks that cannot be exported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from methods import METHODS
from pipeline.errors import RunError, UserError
from pipeline.exporting import onnx_files, parity
from pipeline.exporting.network import DeployedNetwork, refines
from pipeline.exporting.parity import BOUND, batches, embedding_difference, made_images
from pipeline.exporting.torch_program import load_program, write_program
from tests.pipeline.exporting.made import made_model

FREE = ("batch", None, None, None)
EXTRA: dict[str, dict[str, Any]] = {"mmsi": {"model.batch_norm": "frozen"}, "gca_hng": {"method.heads": 2},
         "smart_mining": {"method.triplets_per_batch": 4, "method.classes_per_batch": 24, "method.samples_per_class": 4}}  # fmt: skip
GRAPH = {"method.name": "intra_batch", "method.embedding_dim": 8, "method.heads": 2}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_trunk_and_embed(name: str, tmp_path: Path) -> None:
    model = made_model({"method.name": name, **EXTRA.get(name, {})})
    network = DeployedNetwork(model)
    assert embedding_difference(network, model.embed_pixels, batches((24, 24))) < BOUND
    if name == "gca_hng":  # the one whose head is not that of the base class
        write_program(network, made_images(2, 24, 24), tmp_path / "m.pt2", FREE, "the network")
        assert embedding_difference(load_program(tmp_path / "m.pt2"), model.embed_pixels, batches((24, 24))) < BOUND
    assert not refines(model)


def test_a_method_that_refines_embeddings_together_is_noticed() -> None:
    assert refines(made_model({**GRAPH, "method.inference": "reciprocal"}))
    assert not refines(made_model({**GRAPH, "method.inference": "embedding"}))


@pytest.mark.parametrize("precision", ["float64", "float32", "bf16"])
def test_it_computes_in_float32(precision: str) -> None:
    model = made_model({"precision": precision})
    network = DeployedNetwork(model)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    difference = embedding_difference(network, model.embed_pixels, batches((24, 24)))
    assert (difference < BOUND) == (precision != "bf16") and difference < 0.1
    assert network.trunk is not model.trunk and model.trunk.folding is not None


# ---- the comparison --------------------------------------------------------------------------------------------------


def test_differences() -> None:
    images = [made_images(2, 4, 4), made_images(3, 4, 4, seed=1)]

    def mean(batch: torch.Tensor) -> torch.Tensor:
        return batch.float().flatten(1)[:, :5] / 1000

    assert embedding_difference(mean, mean, images) == 0
    assert embedding_difference(lambda b: mean(b) + 0.25, mean, images) == pytest.approx(0.25)
    assert embedding_difference(lambda b: 1000 * mean(b) + 1, lambda b: 1000 * mean(b), images) < 0.01  # of the length
    assert embedding_difference(lambda b: mean(b) * math.nan, mean, images) == math.inf
    assert embedding_difference(lambda b: mean(b)[:, :4], mean, images) == math.inf
    assert parity.check(1e-6, BOUND, "x") == 1e-6
    for bad in (2e-5, math.inf, math.nan):
        with pytest.raises(RunError, match=r"the network differs from the trained model by .*nothing was written"):
            parity.check(bad, BOUND, "the network")
    assert torch.equal(made_images(2, 5, 6), made_images(2, 5, 6)) and made_images(2, 5, 6).shape == (2, 3, 5, 6)
    assert not torch.equal(made_images(2, 5, 6), made_images(2, 5, 6, seed=1))


# ---- what cannot be exported -----------------------------------------------------------------------------------------


class Undecided(nn.Module):
    """Takes one way or another, by the values of its input."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float().mean((2, 3))
        return x if float(x.sum()) > 0 else -x


class FixedBatch(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().reshape(2, 192)[:, :4]


@pytest.mark.parametrize("network", [Undecided(), FixedBatch()], ids=["branch", "fixed batch"])
def test_a_network_that_cannot_be_traced_is_one_line(network: nn.Module, tmp_path: Path) -> None:
    for write, says in (
        (
            lambda path: write_program(network.eval(), made_images(2, 8, 8), path, FREE, "backbone 'mine:Net'"),
            "by torch.export",
        ),
        (
            lambda path: onnx_files.write_onnx(
                network.eval(), made_images(2, 8, 8), path, ("a", "b"), FREE, "backbone 'mine:Net'"
            ),
            "to ONNX",
        ),
    ):
        with pytest.raises(UserError) as caught:
            write(tmp_path / "m")  # type: ignore[no-untyped-call]
        text = str(caught.value)
        assert (
            text.startswith(f"backbone 'mine:Net' cannot be exported {says}: ") and "\n" not in text and len(text) < 500
        )
        assert text.endswith("; --format safetensors takes any")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = onnx_files.importlib.util.find_spec
    monkeypatch.setattr(onnx_files.importlib.util, "find_spec", lambda name: None if "onnxs" in name else found(name))
    with pytest.raises(UserError, match=r"ONNX files need onnxscript: pip install 'raydml\[export\]'"):
        onnx_files.check_installed()


def test_a_network_above_two_gigabytes_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        large = nn.Linear(30_000, 30_000)
    with pytest.raises(UserError, match=r"has 3\.6 GB of weights, an ONNX file at most 2 GB"):
        onnx_files.write_onnx(large, torch.zeros(1), tmp_path / "m", ("a", "b"), FREE, "backbone 'x'")
