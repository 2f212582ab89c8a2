"""`python -m pipeline.export`: every format of a trained run, read back by what it is for; and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard, constants

import raydml
from pipeline import export
from pipeline.exporting import export_model as room
from pipeline.exporting import parity
from pipeline.exporting.export_model import ExportOptions, export_model
from pipeline.exporting.parity import made_images
from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.storage import Folder
from pipeline.vision_libraries import timm
from tests.hub import TOKEN, hub_server
from tests.pipeline.conftest import Base
from tests.pipeline.exporting.made import made_model
from tests.pipeline.inference.test_evaluate import quiet

__all__ = ["quiet"]  # fixture


@pytest.fixture
def model(base: Base) -> EmbeddingModel:
    return raydml.load(base.run.uri, device="cpu")


def exported(base: Base, target: Path, capsys: pytest.CaptureFixture, *options: str) -> str:
    """Runs the command; returns what it printed."""
    capsys.readouterr()
    status = export.main([base.run.uri, "--to", str(target), *options])
    out, err = capsys.readouterr()
    assert not err, err
    assert status == 0 and out.splitlines()[-1].startswith(f"written: {target} (")
    return out


def checked_record(folder: Path) -> dict[str, Any]:
    """export.json, after a look at the checksums: of every file but itself and the card."""
    record = json.loads((folder / "export.json").read_text())
    files = {p.name for p in folder.iterdir()} - {"export.json", "README.md"}
    assert record["sha256"] == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    return record


def test_a_folder_that_raydml_loads(
    base: Base, model: EmbeddingModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = exported(base, tmp_path / "out", capsys, "--licence", "mit")
    assert "the written folder: max difference 0 on 6 images" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "class_names.json", "method.safetensors", "model.json", "trunk.safetensors"
    ]  # fmt: skip
    loaded = raydml.load(str(tmp_path / "out"), device="cpu")
    images = list(made_images(3, 40, 31))
    assert torch.equal(loaded.embed(images), model.embed(images)) and loaded.fingerprint == model.fingerprint
    final = base.run.read_json("summary.json")["final"]
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert (card.data.license, card.data.library_name) == ("mit", "raydml") and "image-retrieval" in card.data.tags
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results == {k: v for k, v in final.items() if not k.startswith("queries")}
    for text in (
        'raydml.load("FOLDER")', f"| Recall@1 | {base.run.read_json('summary.json')['frozen']['recall@1']:.2f} | "
        f"{final['recall@1']:.2f} |", "| test pixels | resize 24, centre crop 24 |", "Trained on 9 classes of tiny",
        "mit, as stated by the publisher",
    ):  # fmt: skip
        assert text in card.text, text
    assert str(base.root) not in card.content


def test_a_damaged_folder_is_one_line(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    exported(base, tmp_path / "out", capsys)
    for name, says in (
        ("trunk.safetensors", "is damaged (its checksum differs)"),
        ("method.safetensors", "is missing"),
    ):
        copy = Path(shutil.copytree(tmp_path / "out", tmp_path / name))
        data = (copy / name).read_bytes()
        (copy / name).unlink()
        if "damaged" in says:
            (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert export.main([str(copy), "--to", str(tmp_path / "again")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"{name} {says}" in err
        assert not (tmp_path / "again").exists()


def test_onnx_with_preprocessing_and_int8(
    base: Base, model: EmbeddingModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """uint8 images of any size and number in, unit vectors out; the int8 network's figures beside those of the float one."""
    out = exported(base, tmp_path / "out", capsys, "--format", "onnx", "--preprocessing", "--int8")
    record = checked_record(tmp_path / "out")
    assert set(record["sha256"]) == {"model.onnx", "model.int8.onnx"}
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for num, height, width in ((1, 24, 24), (3, 51, 40), (2, 9, 70)):
        images = made_images(num, height, width)
        (found,) = session.run(None, {"images": images.numpy()})
        pixels = torch.stack([model.preprocess(image) for image in images])
        expected = model.embed_pixels(pixels).numpy()
        assert found.dtype == np.float32 and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        assert np.abs(found - expected).max() < (1e-5 if height == width else 0.02)  # pixels may differ by 1 or 2
    assert record["measured"]["max_difference"] < 1e-5 and record["measured"]["max_pixel_difference"] <= 2
    assert "preprocessing: max difference" in out and "the ONNX network with preprocessing: max difference" in out
    int8, final = record["measured"]["int8"], base.run.read_json("summary.json")["final"]
    assert int8["float32"]["recall@1"] == pytest.approx(final["recall@1"], abs=1e-3) and int8["images"] == 28
    assert f"int8: recall@1 {int8['float32']['recall@1']:.2f} -> {int8['int8']['recall@1']:.2f} %" in out
    assert int8["bytes"][1] < int8["bytes"][0] / 2
    small = onnxruntime.InferenceSession(tmp_path / "out" / "model.int8.onnx")
    (found,) = small.run(None, {"images": images.numpy()})
    assert 1e-5 < np.abs(found - expected).max() < 0.3
    assert 'session.run(None, {"images": images})[0]' in (tmp_path / "out" / "README.md").read_text()


def test_torch_export_with_preprocessing(
    base: Base, model: EmbeddingModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    exported(base, tmp_path / "out", capsys, "--format", "torch_export", "--preprocessing")
    record = checked_record(tmp_path / "out")
    assert record["input"] == {"dtype": "uint8", "shape": "[B, 3, H, W]", "colours": "RGB", "preprocessing": True}
    network = torch.export.load(tmp_path / "out" / "model.pt2").module()
    for num, height, width in ((1, 24, 24), (3, 51, 40), (1, 1, 1)):
        images = made_images(num, height, width)
        expected = model.embed_pixels(torch.stack([model.preprocess(image) for image in images]))
        assert (network(images) - expected).abs().max() < 0.02


@pytest.mark.slow
def test_stated_sizes_need_no_free_axes(model: EmbeddingModel, tmp_path: Path) -> None:
    lines: list[str] = []
    options = ExportOptions("torch_export", preprocessing=True, image_size=(40, 31))
    record = export_model(model, Folder(tmp_path / "out"), options, lines.append)
    assert record["input"]["shape"] == "[B, 3, 40, 31]" and "preprocessing: max difference" in lines[2]
    network = torch.export.load(tmp_path / "out" / "model.pt2").module()
    images = made_images(3, 40, 31)
    assert (network(images) - model.embed(list(images))).abs().max() < 0.02


@pytest.mark.parametrize(
    ("changes", "pooled"),
    [({}, True), ({"model.pooling": "avg+max"}, False), ({"model.backbone": "test_vit", "data.transforms.size": 48}, False),
     ({"model.backbone": "test_vit", "data.transforms.size": 48, "model.pooling": "native"}, True),
     ({"data.transforms.evaluation_scale": 1.5}, True)],
)  # fmt: skip
def test_timm_loads_the_backbone(changes: dict[str, Any], pooled: bool, tmp_path: Path) -> None:
    model = made_model({"model.batch_norm": "frozen", **changes})
    export_model(model, Folder(tmp_path / "out"), ExportOptions("timm"))
    net = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    size = model.transforms.size
    pixels = made_images(2, size, size)
    mean, std = (torch.tensor(net.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        found, expected = net((pixels / 255 - mean) / std), model.trunk(pixels)
    if pooled:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert found.ndim > 2
    assert net.pretrained_cfg["input_size"] == (3, size, size)
    said = "the pooled features of the trunk" if pooled else "the last map or tokens, before the pooling"
    assert said in (tmp_path / "out" / "README.md").read_text()


# ---- what the card claims --------------------------------------------------------------------------------------------


def test_figures_of_another_checkpoint_are_not_claimed(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    exported(base, tmp_path / "out", capsys, "--checkpoint", "last")
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.eval_results is None and "Not measured on test classes." in card.text
    assert json.loads((tmp_path / "out" / "model.json").read_text())["figures"] == {}


def test_the_card_says_what_the_files_do_not_do(tmp_path: Path) -> None:
    graph = {"method.name": "intra_batch", "method.heads": 2, "method.inference": "reciprocal", "precision": "bf16"}
    export_model(made_model(graph), Folder(tmp_path / "out"), ExportOptions())
    text = (tmp_path / "out" / "README.md").read_text()
    assert "refined by looking at all test images together" in text and "Trained in bfloat16" in text
    assert "Not stated. Besides the publisher's own terms" in text


def test_dimensions_that_were_trained_are_in_the_card(model: EmbeddingModel, tmp_path: Path) -> None:
    model.figures["by_dim"] = {"8": {"recall@1": 50.0}, "4": {"recall@1": 40.0}}
    export_model(model, Folder(tmp_path / "out"), ExportOptions())
    assert "| 4 | 40.00 |" in (tmp_path / "out" / "README.md").read_text()


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def test_pushed_to_the_hub_and_loaded_from_there(
    base: Base, model: EmbeddingModel, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        assert export.main([base.run.uri, "--to", str(tmp_path / "a"), "--push-to-hub", "me/tiny", "--private"]) == 0
        assert f"pushed: {hub.url}/me/tiny/commit/" in capsys.readouterr().out
        assert hub.private == {"me/tiny": True}
        assert hub.files["me/tiny"] == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
        assert b'raydml.load("hf://me/tiny")' in hub.files["me/tiny"]["README.md"]
        loaded = raydml.load("hf://me/tiny", device="cpu")
        images = list(made_images(2, 30, 30))
        assert torch.equal(loaded.embed(images), model.embed(images))

        monkeypatch.setenv("HF_TOKEN", "hf_other")
        capsys.readouterr()  # a progress bar
        assert export.main([base.run.uri, "--to", str(tmp_path / "b"), "--push-to-hub", "me/new"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "me/new cannot be uploaded" in err and "401" in err and "hf_other" not in err
        assert (tmp_path / "b" / "model.json").exists() and "me/new" not in hub.files
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert export.main([base.run.uri, "--to", str(tmp_path / "c"), "--push-to-hub", "me/tiny"]) == 2
    assert "me/tiny cannot be uploaded to the Hugging Face Hub (" in capsys.readouterr().err


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_leaves_nothing(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    run, new = base.run.uri, str(tmp_path / "new")
    for arguments, says in (
        ([run, "--to", str(tmp_path / "full")], "full is not empty: choose another folder, or remove it"),
        ([run, "--to", str(tmp_path / "file" / "x")], "is not writable"),
        ([str(tmp_path / "no"), "--to", new], "is neither a run"),
        ([run, "--to", new, "--checkpoint", "77"], "--checkpoint 77: expected best, last or one of the steps"),
        (
            [run, "--to", new, "--preprocessing"],
            "--preprocessing goes with --format onnx or torch_export, not with safetensors",
        ),
        ([run, "--to", new, "--format", "timm", "--preprocessing"], "not with timm, which holds weights only"),
        (
            [run, "--to", new, "--format", "torch_export", "--int8"],
            "--int8 goes with --format onnx, not with torch_export",
        ),
        ([run, "--to", new, "--format", "onnx", "--data", "x"], "--data is what --int8 is measured on"),
        ([run, "--to", new, "--format", "onnx", "--image-size", "4", "5"], "--image-size 4 5: expected two numbers"),
        (
            [run, "--to", new, "--format", "onnx", "--preprocessing", "--image-size", "0", "5"],
            "--image-size 0 5: expected",
        ),
        ([run, "--to", new, "--private"], "--private goes with --push-to-hub"),
        ([run, "--to", new, "--push-to-hub", "tiny"], "--push-to-hub 'tiny': expected OWNER/NAME"),
        (
            [run, "--to", new, "--push-to-hub", "me/tiny"],
            "needs a token with the right to write, in the environment variable HF_TOKEN",
        ),
    ):
        assert export.main(arguments) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and says in err and not out, (arguments, err)
        assert not Path(new).exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["x"]
    with pytest.raises(SystemExit, match="2"):
        export.main([run, "--to", new, "--format", "caffe"])
    assert "invalid choice: 'caffe'" in capsys.readouterr().err


def test_an_exported_model_has_no_test_images(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    exported(base, tmp_path / "out", capsys)
    given = ["--to", str(tmp_path / "new"), "--format", "onnx", "--int8"]
    assert export.main([str(tmp_path / "out"), *given]) == 2
    err = capsys.readouterr().err
    assert "--int8 measures its loss on test images, and an exported model has none: give --data DATASET" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "backbone", ["torchvision/resnet18", "bn_inception", "tests.pipeline.exporting.test_export:Branching"]
)
def test_timm_takes_its_own_backbones_only(backbone: str, tmp_path: Path) -> None:
    model = made_model({"model.backbone": backbone, "model.batch_norm": "frozen", "data.transforms.size": 64})
    with pytest.raises(raydml.UserError, match="--format timm is for backbones of timm, this model's is '"):
        export_model(model, Folder(tmp_path / "out"), ExportOptions("timm"))
    assert not (tmp_path / "out").exists()


class Branching(torch.nn.Module):
    """A backbone of a user's own that takes one way or another by the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.conv(x)
        return maps if float(maps.sum()) > 0 else -maps


def test_an_own_backbone_that_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    own = {"model.backbone": "tests.pipeline.exporting.test_export:Branching", "model.batch_norm": "frozen"}
    model = made_model(own)
    with pytest.raises(raydml.UserError) as caught:
        export_model(model, Folder(tmp_path / "out"), ExportOptions("torch_export"))
    assert "Branching' cannot be exported by torch.export: " in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    export_model(model, Folder(tmp_path / "out"), ExportOptions("safetensors"))


def test_nothing_is_left_of_a_network_that_differs(model: EmbeddingModel, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(parity, "BOUND", -1.0)
    for options in (ExportOptions("timm"), ExportOptions("safetensors")):
        with pytest.raises(raydml.RunError, match=r"differs from the trained model by .*nothing was written"):
            export_model(model, Folder(tmp_path / "out"), options)
        assert not (tmp_path / "out").exists()


def test_a_network_that_was_damaged_on_the_way_is_noticed(
    model: EmbeddingModel, tmp_path: Path, monkeypatch: Any
) -> None:
    """A weight that differs by a thousandth is above the bound."""
    read = room.read_model

    def wrong(*arguments: Any) -> EmbeddingModel:
        found = read(*arguments)
        with torch.no_grad():
            found.method.head.linear.weight[0].mul_(1.001)
        return found

    monkeypatch.setattr(room, "read_model", wrong)
    (tmp_path / "out").mkdir()
    with pytest.raises(raydml.RunError, match="the written folder differs from the trained model"):
        export_model(model, Folder(tmp_path / "out"), ExportOptions())
    assert not list((tmp_path / "out").iterdir())
