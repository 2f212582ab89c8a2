"""Distances, reducers and regularizers by name, one learnt boundary, errors of the library, classes of a user's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from torch.nn.functional import normalize

from methods import plugins
from methods.base import MethodError
from methods.baseline import Baseline, BaselineConfig
from methods.functional import global_generators
from methods.metric_learning import build_loss, build_miner, evaluate_loss

DIM, CLASSES = 6, 5


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = torch.randn(12, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return normalize(embeddings), torch.arange(12) % CLASSES


LP1 = {"name": "LpDistance", "p": 1, "normalize_embeddings": False}
BUILT: dict[str, tuple[str, dict[str, Any], Any]] = {
    "distance": ("ContrastiveLoss", {"distance": LP1}, lambda: losses.ContrastiveLoss(distance=distances.LpDistance(p=1, normalize_embeddings=False))),
    "distance by its name": ("TripletMarginLoss", {"margin": 0.2, "distance": "CosineSimilarity"}, lambda: losses.TripletMarginLoss(margin=0.2, distance=distances.CosineSimilarity())),
    "reducer": ("TripletMarginLoss", {"reducer": {"name": "ThresholdReducer", "low": 0.1}}, lambda: losses.TripletMarginLoss(reducer=reducers.ThresholdReducer(low=0.1))),
    "reducer in a reducer": ("NTXentLoss", {"reducer": {"name": "PerAnchorReducer", "reducer": "SumReducer"}}, lambda: losses.NTXentLoss(reducer=reducers.PerAnchorReducer(reducer=reducers.SumReducer()))),
    "reducers by sub-loss": ("ContrastiveLoss", {"reducer": {"name": "MultipleReducers", "reducers": {"pos_loss": "MeanReducer", "neg_loss": {"name": "ThresholdReducer", "low": 0}}}}, lambda: losses.ContrastiveLoss(reducer=reducers.MultipleReducers({"pos_loss": reducers.MeanReducer(), "neg_loss": reducers.ThresholdReducer(low=0)}))),
    "embedding regularizer": ("TripletMarginLoss", {"embedding_regularizer": {"name": "LpRegularizer", "p": 1}, "embedding_reg_weight": 0.3}, lambda: losses.TripletMarginLoss(embedding_regularizer=regularizers.LpRegularizer(p=1), embedding_reg_weight=0.3)),
    "weight regularizer": ("ProxyAnchorLoss", {"weight_regularizer": "RegularFaceRegularizer", "weight_reg_weight": 2.0}, lambda: losses.ProxyAnchorLoss(CLASSES, DIM, weight_regularizer=regularizers.RegularFaceRegularizer(), weight_reg_weight=2.0)),
    "centres of the regularizer": ("SoftTripleLoss", {"centers_per_class": 2, "weight_regularizer": {"name": "SparseCentersRegularizer", "centers_per_class": 2}}, lambda: losses.SoftTripleLoss(CLASSES, DIM, centers_per_class=2, weight_regularizer=regularizers.SparseCentersRegularizer(CLASSES, 2))),
    "one boundary": ("MarginLoss", {"num_classes": None, "learn_beta": True, "nu": 0.1}, lambda: losses.MarginLoss(learn_beta=True, nu=0.1)),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT)
def test_parts_by_name_equal_the_library_called_directly(name: str) -> None:
    loss, arguments, direct = BUILT[name]
    config = BaselineConfig(loss=loss, loss_args=arguments, embedding_dim=DIM)
    with global_generators(1):
        built = build_loss(config.loss, config.loss_args, CLASSES, DIM).double()
    with global_generators(1):
        expected = direct().double()
    embeddings, labels = batch()
    assert evaluate_loss(built, None, embeddings, labels).item() == pytest.approx(expected(embeddings, labels).item())
    if name == "one boundary":
        assert Baseline(config, 4, CLASSES).loss_function.beta.shape == (1,)


def test_miners_take_distances_too() -> None:
    miner = build_miner("TripletMarginMiner", {"margin": 0.3, "distance": {"name": "LpDistance", "p": 1}})
    direct = miners.TripletMarginMiner(margin=0.3, distance=distances.LpDistance(p=1))
    assert all(torch.equal(a, b) for a, b in zip(miner(*batch()), direct(*batch()), strict=True))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"distance": {"name": "LpDistanse"}}, "loss_args.distance 'LpDistanse' is unknown: did you mean 'LpDistance'"),
        ({"distance": {"name": "LpDistance", "q": 2}}, "LpDistance takes no argument 'q'"),
        ({"distance": {"p": 2}}, r"loss_args.distance is \{'p': 2\}, expected a name, or \{name: LpDistance, p: 2\}"),
        ({"distance": 3}, "loss_args.distance is 3, expected a name"),
        ({"reducer": "LpDistance"}, "loss_args.reducer 'LpDistance' is unknown"),
        ({"reducer": {"name": "MultipleReducers", "reducers": {"pos_loss": "Mean"}}}, "loss_args.reducer.reducers.pos_loss 'Mean' is unknown"),
        ({"num_classes": 4}, "loss_args.num_classes follows from the data and the head: leave it out"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_part_is_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        BaselineConfig(loss="MarginLoss", loss_args=arguments)


def test_an_error_inside_the_library_names_loss_and_batch() -> None:
    loss = build_loss("HistogramLoss", {"n_bins": 10}, CLASSES, DIM)
    embeddings = torch.zeros(4, DIM, dtype=torch.float64)
    embeddings[:, 0] = 1.001  # not of length one: cosines outside the histogram
    embeddings.requires_grad_()
    with pytest.raises(MethodError, match=r"^HistogramLoss failed on a batch of 4 embeddings: ") as caught:
        evaluate_loss(
            loss, None, embeddings * torch.tensor([1.0, 1.0, 1.0, float("nan")])[:, None], torch.tensor([0, 0, 1, 1])
        )
    assert "\n" not in str(caught.value)


# ---- a user's own classes --------------------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn
from pytorch_metric_learning import losses

class Mean(nn.Module):
    def __init__(self, scale=1.0, embedding_size=0):
        super().__init__()
        self.scale, self.size = scale, embedding_size
    def forward(self, embeddings, labels):
        return self.scale * embeddings.square().mean()

class Margin(losses.TripletMarginLoss):
    pass

class Broken(nn.Module):
    def forward(self, embeddings, labels):
        return embeddings.nothing

class Hard(nn.Module):
    def forward(self, embeddings, labels, ref_emb=None, ref_labels=None):
        z = torch.zeros(1, dtype=torch.long)
        return z, z + 4 % 3, z + 2

def function(embeddings, labels):
    return embeddings.sum()

class NoModule:
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in a folder that was added; its name is used once."""
    name = f"own_losses_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.setenv(plugins.FOLDERS, "")
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    plugins.add_folder(tmp_path)
    return name


def test_losses_and_miners_by_import_string(own: str) -> None:
    config = BaselineConfig(loss=f"{own}:Mean", loss_args={"scale": 3.0}, embedding_dim=DIM)
    loss = build_loss(config.loss, config.loss_args, CLASSES, DIM)
    embeddings, labels = batch()
    assert evaluate_loss(loss, None, embeddings, labels).item() == pytest.approx(3 * float(embeddings.square().mean()))
    assert loss.size == DIM, "the sizes that follow from data and head are given"
    config = BaselineConfig(loss=f"{own}:Margin", loss_args={"distance": "CosineSimilarity"}, miner=f"{own}:Hard")
    assert BaselineConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"loss": "{own}:Meen"}, r"loss '{own}:Meen': {own} \(.*py\) has no 'Meen': did you mean 'Mean'\?"),
        ({"loss": "{own}s:Mean"}, "there is no module '{own}s' in .* nor among the installed packages: did you mean '{own}'"),
        ({"loss": "{own}:function"}, "'{own}:function' is a function, expected a class derived from torch.nn"),
        ({"loss": "{own}:NoModule"}, "is the class NoModule, expected a class derived from torch.nn"),
        ({"loss": "{own}:Mean", "loss_args": {"scales": 2}}, "takes no argument 'scales': did you mean 'scale'"),
        ({"loss": "{own}:Broken"}, r"no attribute 'nothing' \({own}.py, line 18\)"),
        ({"loss": "{own}:Mean", "miner": "{own}:Hard"}, "{own}:Hard.* fails on a batch of random embeddings"),
    ],
)  # fmt: skip
def test_wrong_import_strings_are_one_line(own: str, values: dict[str, Any], says: str) -> None:
    filled = {n: v.replace("{own}", own) if isinstance(v, str) else v for n, v in values.items()}
    with pytest.raises(ValidationError, match=re.sub("{own}", own, says)):
        BaselineConfig(**filled)


def test_a_module_that_fails_to_import_names_the_line(own: str, tmp_path: Path) -> None:
    (tmp_path / f"{own}_bad.py").write_text("import torch\n\nx = 1 / 0\n")
    (tmp_path / f"{own}_needs.py").write_text("import package_that_is_not_there\n")
    with pytest.raises(ValueError, match=rf"importing {own}_bad failed: ZeroDivisionError: .*\({own}_bad.py, line 3\)"):
        plugins.load(f"{own}_bad:x", "loss")
    with pytest.raises(
        ValueError, match=rf"importing {own}_needs failed: ModuleNotFoundError: No module named 'package_that"
    ):
        plugins.load(f"{own}_needs:x", "loss")
