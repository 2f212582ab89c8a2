"""Backbones of every kind of output: pooled over the places of the image, at any size that the network can be made for."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import timm
import torch

from pipeline.errors import UserError
from pipeline.model import ModelConfig, build_trunk
from pipeline.model.pooling import Layout, Pool
from pipeline.model.trunk import Trunk


def build(backbone: str, size: int, **values: object) -> Trunk:
    torch.manual_seed(0)
    return build_trunk(ModelConfig.model_validate({"backbone": backbone, "weights": "none", **values}), size).eval()


def pixels(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pooling", ["avg", "max", "avg+max"])
@pytest.mark.parametrize(
    ("backbone", "size", "features"),
    [
        ("swin_tiny_patch4_window7_224", 64, 768),
        ("swinv2_tiny_window8_256", 64, 768),
        ("mambaout_femto", 64, 288),
        ("sequencer2d_s", 64, 384),
        ("hieradet_small", 64, 768),
    ],
)
def test_maps_with_channels_last_are_pooled_over_height_and_width(
    backbone: str, size: int, features: int, pooling: str
) -> None:
    trunk = build(backbone, size, pooling=pooling)
    x = trunk.normalise(pixels(size))
    with torch.no_grad():
        maps = trunk.backbone(x)
        got = trunk(pixels(size))
    assert maps.shape[-1] == features == trunk.features and maps.ndim == 4
    places = maps.reshape(2, -1, features)
    expected = {"avg": places.mean(1), "max": places.amax(1), "avg+max": places.mean(1) + places.amax(1)}[pooling]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("backbone", "prefix"), [("test_vit", 1), ("vit_tiny_patch16_224", 1), ("vit_small_patch14_reg4_dinov2", 5)]
)
def test_patch_tokens_are_pooled_without_class_and_register_tokens(backbone: str, prefix: int) -> None:
    size = 112
    trunk = build(backbone, size, pooling="avg")
    with torch.no_grad():
        tokens = trunk.backbone(trunk.normalise(pixels(size)))
        torch.testing.assert_close(trunk(pixels(size)), tokens[:, prefix:].mean(1))
    reference = timm.create_model(backbone, num_classes=0, img_size=size, global_pool="token")
    reference.load_state_dict(trunk.backbone.state_dict())
    native = build(backbone, size, pooling="native")
    native.backbone.load_state_dict(trunk.backbone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(native(pixels(size)), reference.eval()(trunk.normalise(pixels(size))))


@pytest.mark.parametrize(("backbone", "tokens"), [("mixer_s32_224", 4), ("levit_128s", 1), ("volo_d1_224", 16)])
def test_tokens_without_a_declared_prefix(backbone: str, tokens: int) -> None:
    trunk = build(backbone, 64, pooling="avg")
    with torch.no_grad():
        sequence = trunk.backbone(trunk.normalise(pixels(64)))
    torch.testing.assert_close(trunk(pixels(64)), sequence[:, -tokens:].mean(1))


@pytest.mark.parametrize(
    ("backbone", "says"),
    [
        ("pit_ti_224", r"gives \(1, 256\) for an image.*set model.pooling to native"),
        ("deit_tiny_distilled_patch16_224", "gives pooled features, expected maps .*set model.pooling to native"),
        ("inception_next_atto", "pooling of inception_next_atto cannot be replaced .*set model.pooling to native"),
    ],
)
def test_what_cannot_be_pooled_is_refused(backbone: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(backbone, 224, pooling="avg")
    assert build(backbone, 224, pooling="native").features > 0


@pytest.mark.parametrize("size", [96, 160])
@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224"])
def test_networks_of_one_size_are_made_for_the_size_of_the_images(backbone: str, size: int) -> None:
    assert build(backbone, size, pooling="native").features == timm.create_model(backbone, num_classes=0).num_features


def test_a_size_that_is_no_multiple_of_the_patches_names_the_next_ones() -> None:
    with pytest.raises(UserError, match=r"patches of 14×14 pixels, data.transforms.size is 225: set it to 224 or 238"):
        build("vit_small_patch14_dinov2", 225, pooling="native")


def test_a_size_of_evaluation_is_checked() -> None:
    build("test_resnet", 32).check_evaluation(48)
    vit = "vit_tiny_patch16_224"
    with pytest.raises(
        UserError, match=rf"{vit} cannot take images of 96×96 in evaluation: .*scale to 1, or .*dynamic_img_size"
    ):
        build(vit, 64).check_evaluation(96)
    resampled = build(vit, 64, backbone_args={"dynamic_img_size": True})
    resampled.check_evaluation(96)
    with pytest.raises(
        UserError, match=r"patches of 16×16 pixels, those of evaluation have 92: .* they have 80 or 96, or 1$"
    ):
        resampled.check_evaluation(92)


def test_a_size_that_is_too_small_names_the_usual_one() -> None:
    with pytest.raises(
        UserError, match=r"cannot take images of 96×96: .*; data.transforms.size: 224 is its usual size"
    ):
        build("efficientformer_l1", 96)


@pytest.mark.parametrize(
    ("name", "size", "pooling", "features"),
    [
        ("swin_t", 64, "max", 768),
        ("vit_b_32", 64, "native", 768),
        ("squeezenet1_1", 64, "native", 512),
        ("squeezenet1_1", 64, "max", 512),
    ],
)
def test_widths_of_torchvision(name: str, size: int, pooling: str, features: int) -> None:
    assert build(f"torchvision/{name}", size, pooling=pooling).features == features


def test_pools_of_both_layouts_agree() -> None:
    maps = torch.randn(2, 5, 3, 4)
    for kind in ("avg", "max", "avg+max"):
        nchw = Pool(kind)(maps).flatten(1)
        assert torch.allclose(Pool(kind, Layout("NHWC"))(maps.permute(0, 2, 3, 1)).flatten(1), nchw)
        tokens = torch.cat([torch.full((2, 1, 5), 99.0), maps.flatten(2).mT], 1)
        assert torch.allclose(Pool(kind, Layout("NLC", 1))(tokens).flatten(1), nchw)


def test_without_a_connection_the_remedy_is_named_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for backbone, weights, says in (
        ("test_resnet", "pretrained", "without a connection, set model.weights to a file, or to none"),
        ("hf-hub:timm/test_resnet.r160_in1k", "none", "set model.backbone to the name of a timm model"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            build(backbone, 32, weights=weights)
        assert "\n" not in str(caught.value) and "cannot be downloaded" in str(caught.value)


def test_a_model_folder_in_the_form_of_the_hub(tmp_path: Path) -> None:
    net = timm.create_model("test_vit", num_classes=0)
    timm.models.save_for_hf(net, tmp_path, model_config={"num_classes": 0})
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "test_vit"
    trunk = build(f"local-dir:{tmp_path}", 80, weights="pretrained", pooling="native")
    assert torch.equal(trunk.backbone.cls_token, net.cls_token)
    assert trunk.backbone.pos_embed.shape == (1, 26, 64)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"backbone": "resnet50.a9_in1k"}, "resnet50 has no weights 'a9_in1k', did you mean"),
        ({"backbone": "resnet10t", "backbone_args": {"foo": 1}}, "cannot be built: .*argument 'foo'"),
        ({"backbone": "local-dir:/nowhere/at/all"}, "expected a folder with config.json and weights"),
        ({"backbone": "nonexistent", "weights": "pretrained"}, "backbone 'nonexistent' is unknown"),
    ],
)
def test_backbones_that_cannot_be_built(values: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(str(values.pop("backbone")), 32, **values)


def test_arguments_reach_the_backbone() -> None:
    assert build("test_resnet", 32, backbone_args={"output_stride": 8}).backbone.layer4[0].conv1.stride in (1, (1, 1))
