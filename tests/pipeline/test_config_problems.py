"""What is told of keys and values that are wrong, and which spellings are accepted."""

from __future__ import annotations

from typing import Any

import pytest

from methods import METHODS
from pipeline.config import Config, build_config
from pipeline.config_problems import ALIASES, _keys, _plain
from pipeline.errors import UserError
from pipeline.recipes import load_config


def refusal(override: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("epochs", "'length'? (with its unit"),
        ("lr", "'method.optimizer.lr'?"),
        ("learning_rate", "'method.optimizer.lr'?"),
        ("batch_size", "'method.classes_per_batch' or 'method.samples_per_class'? (a batch has"),
        ("dataset", "'data.source'?"),
        ("CrossBatchMemory", "'method.memory'?"),
        ("num_workers", "'runtime.workers' or 'runtime.loader_cpus'?"),
        ("gpus", "'runtime.workers' or 'runtime.gpus_per_worker'?"),
        ("image_size", "'data.transforms.size' or 'data.transforms.resize'?"),
        (
            "evaluation.batchsize",
            "'evaluation.batch_size'?",
        ),  # a key of the section goes before the names of other tools
        ("method.lr", "'method.optimizer.lr'?"),
        ("optimizer.lr", "'method.optimizer'?"),
        ("pooling", "'model.pooling'?"),
        ("weight_decai", "'method.optimizer.weight_decay'?"),
    ],
)
def test_an_unknown_key_names_the_key_that_is_meant(key: str, meant: str) -> None:
    assert f"did you mean {meant}" in refusal(f"{key}=1")


def test_far_names_are_not_suggested() -> None:
    assert refusal("tempo=1").endswith("cache, runtime") and "did you mean" not in refusal("tempo=1")


def test_an_option_of_another_method_is_told_with_its_method() -> None:
    assert "it is an option of the method osm_caa (method.name)" in refusal("method.caa=false")
    assert "it is an option of the methods mmsi, smart_mining" not in refusal("caa=1")


def test_every_alias_stands_for_keys_that_exist() -> None:
    keys = {key for name in METHODS for key, _ in _keys(Config, {"method": {"name": name}})}
    for alias, meant in ALIASES.items():
        assert alias == _plain(alias) and meant.keys and set(meant.keys) <= keys, alias


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model=resnet50", "model: got 'resnet50', expected keys and values; did you mean model.backbone=resnet50?"),
        ("data=cub", "did you mean data.source=cub?"),
        ("method.optimizer=adam", "did you mean method.optimizer.name=adam?"),
        ("method.optimizer.schedule=cosine", "did you mean method.optimizer.schedule.kind=cosine?"),
        ("evaluation.reranking=[1]", "evaluation.reranking: got [1], expected keys and values"),
        ("method.loss_args=3", "method.loss_args: got 3, expected keys and values"),
        ("data.transforms.crop_scale=0.5", "data.transforms.crop_scale: got 0.5, expected a list"),
        ("method.loss=CrossBatchMemory", "name the loss that it wraps, and set method.memory"),
        ("length=xepochs", "length: got 'xepochs': 'x' is not a number"),
    ],
)
def test_a_value_of_another_kind_is_told_in_words_of_the_field(override: str, says: str) -> None:
    text = refusal(override)
    assert says in text and "Config" not in text and "dictionary" not in text and "tuple" not in text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("evaluation.recall_at=5", (5,)),
        ("evaluation.recall_at=1, 5,10", (1, 5, 10)),
        ("evaluation.metric=R@1", "recall@1"),
        ("evaluation.metric=MAP@R", "map@r"),
        ("method.optimizer.name=AdamW", "adamw"),
        ("precision=BF16", "bf16"),
        ("model.weights=None", "none"),
        ("model.weights=null", "none"),
        ("model.mean=none", None),
        ("method.miner=None", None),
        ("data.validation_fold=0", 0),
        ("name=2024", "2024"),
    ],
)
def test_spellings_that_are_accepted(override: str, value: Any) -> None:
    found: Any = load_config(None, [override, "model.backbone=resnet18"])
    for key in override.partition("=")[0].split("."):
        found = getattr(found, key)
    assert found == value


@pytest.mark.parametrize("text", ["fp16", "float16", "16"])
def test_half_precision_says_what_to_use(text: str) -> None:
    with pytest.raises(UserError, match=r"float16 needs its loss scaled.* use bf16"):
        load_config(None, [f"precision={text}"])


@pytest.mark.parametrize("text", ["20 epochs", "20epochs", "20 Epochs", " 20 epoch "])
def test_spellings_of_a_length(text: str) -> None:
    assert str(build_config({"length": text}).length) == "20 epochs"
