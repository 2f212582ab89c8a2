"""Weights as other programs write them: what is taken, what is left out, and that no code of a file is run."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch

from pipeline.errors import UserError
from pipeline.model import ModelConfig, build_trunk

State = dict[str, torch.Tensor]


class Settings(dict):
    """A dictionary with attributes, as other programs keep settings in."""


class Harm:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def other(state: State) -> State:
    return {name: torch.zeros_like(value) for name, value in state.items()}


FORMS: dict[str, tuple[Callable[[State], Any], str]] = {
    "timm": (
        lambda s: {
            "epoch": 3,
            "arch": "x",
            "state_dict": s,
            "args": argparse.Namespace(lr=0.1, path=pathlib.Path("/a")),
        },
        "under 'state_dict'",
    ),
    "timm with an average": (lambda s: {"state_dict": other(s), "state_dict_ema": s}, "under 'state_dict_ema'"),
    "lightning": (
        lambda s: {
            "state_dict": prefixed("model.", s) | {"criterion.proxies": torch.zeros(4, 2)},
            "hyper_parameters": Settings(lr=0.1),
            "callbacks": {Settings: 1},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        },
        r"named model\.\*.*left out: 3 \(criterion.proxies, model.fc.bias, model.fc.weight\)",
    ),
    "compile": (lambda s: prefixed("_orig_mod.", s), "tensors taken"),
    "compile inside ddp": (lambda s: prefixed("module._orig_mod.", s), r"named module\.\*"),
    "ddp around compile": (lambda s: prefixed("_orig_mod.module.", s), r"named module\.\*"),
    "compiled blocks": (
        lambda s: {n.replace("layer1.", "layer1._orig_mod."): v for n, v in s.items()},
        "tensors taken",
    ),
    "moco": (
        lambda s: {"state_dict": prefixed("module.encoder_q.", s) | {"module.queue": torch.zeros(3)}},
        r"named module.encoder_q\.\*",
    ),
    "two networks": (lambda s: prefixed("net.", s) | prefixed("net_ema.", other(s)), r"named net\.\*, not net_ema\.\*"),
    "a settings class around it": (lambda s: Settings(model=Settings(s)), "under 'model'"),
    "swa": (lambda s: {"n_averaged": torch.tensor(3), **prefixed("module.", s)}, r"named module\.\*"),
    "trunk of a metric learner": (lambda s: {"model": {"trunk": s, "head": {"w": torch.ones(1)}}}, "under 'trunk'"),
    "half precision": (lambda s: {n: v.half() if v.is_floating_point() else v for n, v in s.items()}, "tensors taken"),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_of_other_programs(form: str, legacy: bool, tmp_path: pathlib.Path) -> None:
    make, says = FORMS[form]
    original = timm.create_model("test_resnet", num_classes=5)
    path = tmp_path / "w.pth"
    torch.save(make(original.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    trunk = build_trunk(ModelConfig(backbone="test_resnet", weights=str(path)), 32)
    expected = {n: v for n, v in original.state_dict().items() if not n.startswith("fc.")}
    rounded = form == "half precision"
    for name, value in trunk.backbone.state_dict().items():
        assert torch.equal(value, expected[name].half().to(value.dtype) if rounded else expected[name]), name
    assert re.search(says, trunk.weights_note), trunk.weights_note
    assert "\n" not in trunk.weights_note and f"weights of {path}: " in trunk.weights_note


def test_position_embeddings_are_fitted_to_the_size(tmp_path: pathlib.Path) -> None:
    original = timm.create_model("test_vit", num_classes=5)
    path = str(tmp_path / "w.pth")
    torch.save({"state_dict": original.state_dict()}, path)
    trunk = build_trunk(ModelConfig(backbone="test_vit", weights=path, pooling="native"), 80)
    resized = timm.layers.resample_abs_pos_embed(original.pos_embed, new_size=[5, 5], num_prefix_tokens=1)
    torch.testing.assert_close(trunk.backbone.pos_embed, resized)
    assert torch.equal(trunk.backbone.cls_token, original.cls_token)


def test_no_code_of_a_file_is_run(tmp_path: pathlib.Path) -> None:
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    for number, payload in enumerate(
        [Harm(str(tmp_path / "harm")), collections.defaultdict(list), types.SimpleNamespace]
    ):
        path = str(tmp_path / f"{number}.pth")
        torch.save({"state_dict": state, "extra": [payload, {"deep": (payload,)}]}, path)
        build_trunk(ModelConfig(backbone="test_resnet", weights=path), 32)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda s: {n: v for n, v in s.items() if n.startswith("conv1")}, r"of \d+ tensors \d+ are missing"),
        (lambda s: prefixed("a.b.", other(s)) | {"a.b.layer1.0.conv1.weight": torch.zeros(2)}, "1 of another shape"),
        (lambda s: {"unrelated.weight": torch.zeros(3)}, r"the file has 1 \(first: \['unrelated.weight'\]\)"),
        (lambda s: {"epoch": 3}, "hold no state dict"),
    ],
)
def test_too_little_is_refused(make: Callable[[State], Any], says: str, tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "w.pth")
    torch.save(make(timm.create_model("test_resnet", num_classes=0).state_dict()), path)
    with pytest.raises(UserError, match=says) as caught:
        build_trunk(ModelConfig(backbone="test_resnet", weights=path), 32)
    assert "\n" not in str(caught.value) and "trust" not in str(caught.value)


def test_a_whole_pickled_network_is_refused_with_the_remedy(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "w.pth")
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UserError, match=r"write one with torch.save\(model.state_dict\(\), ...\)"):
        build_trunk(ModelConfig(backbone="test_resnet", weights=path), 32)
