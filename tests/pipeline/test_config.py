"""Configuration: precedence, errors in one line that name the nearest, and what may change between starts of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from methods import METHODS
from methods.config import Length
from pipeline import recipes
from pipeline.config import Config, build_config, differences, to_yaml
from pipeline.errors import UserError
from pipeline.recipes import load_config, preset_names
from tests.stubs import registered


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def dump(config: Config) -> dict[str, Any]:
    return yaml.safe_load(to_yaml(config))


# ---- precedence ------------------------------------------------------------------------------------------------------


def test_defaults_then_preset_then_file_then_set(tmp_path: Path) -> None:
    preset = load_config("baseline/emoji")
    assert build_config({}).length == Length(value=10, unit="epochs") and preset.length == Length(
        value=4, unit="epochs"
    )
    file = write(
        tmp_path / "r.yaml", "preset: baseline/emoji\nseed: 5\nmethod: {optimizer: {lr: 2e-3, weight_decay: 0.5}}\n"
    )
    config = load_config(file, ["method.optimizer.lr=1e-4", "name=x"])
    assert (config.name, config.seed) == ("x", 5)
    assert config.method.optimizer.lr == 1e-4, "--set above the file"
    assert config.method.optimizer.weight_decay == 0.5, "the file above the preset"
    assert config.method.optimizer.head_lr_multiplier == preset.method.optimizer.head_lr_multiplier != 1, (
        "the preset above defaults"
    )
    assert config.runtime == build_config({}).runtime, "defaults where nobody speaks"
    assert load_config(write(tmp_path / "bare.yaml", "seed: 5\n")).length == Length(value=10, unit="epochs"), (
        "no preset unless asked"
    )


def test_without_a_recipe_the_demo_runs() -> None:
    assert load_config() == load_config("baseline/emoji") != build_config({})


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("method.optimizer.lr=1e-4", 1e-4),  # YAML 1.1 reads this as text
        ("method.optimizer.lr=1E5", 1e5),
        ("method.optimizer.lr=3", 3.0),
        ("data.transforms.squash=true", True),
        ("data.validation_fold=null", None),
        ("data.validation_fold=", None),
        ("data.source=hello world", "hello world"),
        ("evaluation.recall_at=[1, 2]", (1, 2)),
        ("method.loss_args={alpha: 1e-1}", {"alpha": 0.1}),
    ],
)
def test_set_reads_values_as_yaml_with_exponents(override: str, value: object) -> None:
    got: Any = load_config(None, [override])
    for key in override.partition("=")[0].split("."):
        got = getattr(got, key)
    assert got == value and type(got) is type(value)


def test_numbers_with_exponents_in_a_recipe(tmp_path: Path) -> None:
    text = "method: {optimizer: {lr: 1e-4}, loss_args: {alpha: 2e0, beta: +5.E1, base: .5e0}}\n"
    method = load_config(write(tmp_path / "r.yaml", text)).method
    assert method.optimizer.lr == 1e-4 and method.loss_args == {"alpha": 2.0, "beta": 50.0, "base": 0.5}


def test_set_creates_sections_and_reads_equals_signs_in_values(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "name: x\n")
    config = load_config(file, ["data.transforms.size=32", "cache.folder=/a=b", "method.optimizer.schedule.every=3 epochs",
                                "method.optimizer.schedule.kind=step"])  # fmt: skip
    assert config.data.transforms.size == 32 and config.cache.folder == "/a=b"
    assert str(config.method.optimizer.schedule.every) == "3 epochs"


def test_a_section_of_another_method_is_not_inherited(tmp_path: Path) -> None:
    with registered():
        file = write(tmp_path / "r.yaml", "preset: baseline/emoji\nmethod: {name: two_optimizers, embedding_dim: 16}\n")
        assert load_config(file).method == METHODS["two_optimizers"].Config(embedding_dim=16)
        config = load_config(None, ["method.embedding_dim=16", "method.name=two_optimizers"])  # in any order
        assert config.method == METHODS["two_optimizers"].Config(embedding_dim=16)
        assert load_config(None, ["method=two_optimizers"]).method == METHODS["two_optimizers"].Config()


def test_arguments_of_another_loss_replace_those_of_the_preset(tmp_path: Path) -> None:
    text = "preset: baseline/emoji\nmethod: {loss: ContrastiveLoss, loss_args: {neg_margin: 0.5}}\n"
    config = load_config(write(tmp_path / "r.yaml", text))
    assert config.method.loss_args == {"neg_margin": 0.5} and config.method.classes_per_batch == 24


# ---- round trip and presets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_reads_back_equal(name: str) -> None:
    config = load_config(name)
    assert build_config(dump(config)) == config
    assert not differences(dump(config), dump(build_config(dump(config))), runtime=False)


def test_unusual_values_read_back_equal() -> None:
    config = load_config(None, ["length=1234567 steps", "method.optimizer.lr=1e-7", "method.optimizer.weight_decay=0.1234567890123",
                                "checkpoint.every=0.3333333333333333 epochs", "model.mean=[0.1, 0.2, 0.3]",
                                "method.optimizer.schedule={kind: step, milestones: [0.1 epochs, 7 steps]}"])  # fmt: skip
    assert build_config(dump(config)) == config
    with registered():
        other = load_config(None, ["method={name: two_optimizers, classifier: {lr: 0.5}}"])
        assert build_config(dump(other)) == other and dump(other)["method"]["classifier"]["lr"] == 0.5


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sed=1", "unknown key 'sed': did you mean 'seed'?"),
        ("dta.source=x", "did you mean 'data'?"),
        ("data.transform.size=3", "did you mean 'data.transforms'?"),
        ("data.transforms.siz=3", "did you mean 'data.transforms.size'?"),
        ("method.optimiser.lr=1", "did you mean 'method.optimizer'?"),
        ("method.optimizer.schedule.kin=cosine", "did you mean 'method.optimizer.schedule.kind'?"),
        (
            "method.optimizer.schedule.milestones=[{value: 1, unit: steps, unt: 2}]",
            "did you mean 'method.optimizer.schedule.milestones.0.unit'?",
        ),
        ("method.qqq=1", "expected one of name, classes_per_batch"),
        ("method.loss=TripletMargin", "did you mean 'TripletMarginLoss'?"),
        ("method.loss_args.alhpa=1", "did you mean 'alpha'?"),
        ("method.name=baselin", "did you mean 'baseline'?"),
        ("method=[1]", "method [1] is unknown: expected one of baseline, "),
        ("seed=-1", "seed: got -1; input should be greater than or equal to 0"),
        ("seed=1.5", "seed: got 1.5; input should be a valid integer"),
        ("seed=99999999999999999999", "seed: got 99999999999999999999"),
        ("name=a/b", "name: got 'a/b'"),
        ("name=../x", "name: got '../x'"),
        ("length=0 steps", "length is 0: give the run a length"),
        ("length=3", "length: got 3, expected a length with its unit such as '200 steps'"),
        ("length=inf epochs", "finite number"),
        ("protocol=papr", "protocol: got 'papr'; input should be 'fair' or 'paper'"),
        ("precision=fp16", "precision: got 'fp16'"),
        ("data=3", "data: got 3"),
        ("data.validation_fold=-1", "data.validation_fold: got -1"),
        ("data.transforms.size=4", "data.transforms.size: got 4"),
        ("data.transforms.crop_scale=[0.5, 2]", "crop_scale goes up to 2.0, at most 1"),
        ("model.std=[0, 1, 1]", "model.std.0: got 0"),
        ("model.pooling=gem", "model.pooling: got 'gem'"),
        ("method.optimizer.lr=0", "method.optimizer.lr: got 0"),
        ("method.optimizer.lr=.inf", "finite number"),
        ("evaluation.metric=recall@3", "metric is 'recall@3', expected one of ['map@r'"),
        ("evaluation.recall_at=[0]", "every K has to be at least 1"),
        ("evaluation.recall_at=[]", "evaluation.recall_at: got []"),
        ("evaluation.checkpoint=best", "without data.validation_fold there is nothing to choose on: set 'last'"),
        ("checkpoint.keep=0", "checkpoint.keep: got 0"),
        ("runtime.workers=-1", "runtime.workers: got -1"),
        ("runtime.loader=rai", "runtime.loader: got 'rai'; input should be 'ray' or 'in_process'"),
        ("nothing", "--set 'nothing': expected KEY=VALUE"),
        ("=3", "--set '=3': expected KEY=VALUE"),
        ("name=[a", "--set 'name=[a': the value is not valid YAML"),
    ],
)
def test_one_bad_value_is_one_line(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["protocol=paper", "data.validation_fold=0"], "set data.validation_fold to null"),
        (["runtime.gpus_per_worker=1", "precision=float64"], "float64 is for the CPU"),
        (
            ["seed=-1", "method.optimizer.lr=-1"],
            "seed: got -1; input should be greater than or equal to 0; method.optimizer.lr: got -1",
        ),
    ],
)
def test_contradictions_and_several_problems(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, overrides)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [1", "is not valid YAML"),
        (b"\xff\xfe\x00binary", "is not valid YAML"),
        (b"- 1\n- 2\n", "contains a list, expected keys and values"),
        (b"", "is empty: write keys and values, for example `preset: baseline/emoji`"),
        (b"# only a comment\n", "is empty"),
        (b"photos", "contains a single value ('photos'), expected keys and values"),
        (b"seed: 1\nname: a\nseed: 2\n", "the key 'seed' stands twice"),
        (
            b"preset: baseline/emojo\n",
            "preset 'baseline/emojo' does not exist; did you mean the preset 'baseline/emoji'",
        ),
        (b"preset: [1]\n", "does not exist"),
        (b"1: 2\n", "key 1 is int, expected a name"),
    ],
)
def test_bad_recipes(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(str(tmp_path / "r.yaml"))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of that of the presets."""
    (tmp_path / "presets" / "m").mkdir(parents=True)
    monkeypatch.setattr(recipes, "PRESETS", tmp_path / "presets")
    return tmp_path / "presets"


def test_presets_build_on_bases_that_are_not_offered(presets: Path, tmp_path: Path) -> None:
    write(presets / "_all.yaml", "seed: 1\ndata: {source: a, validation_fold: null}\nevaluation: {checkpoint: last}\n")
    write(presets / "m" / "_base.yaml", "preset: _all\nseed: 2\nmethod: {name: baseline, embedding_dim: 8}\n")
    write(presets / "m" / "leaf.yaml", "preset: m/_base\ndata: {source: b}\nmethod: {samples_per_class: 3}\n")
    assert preset_names() == ["m/leaf"]
    config = load_config("m/leaf")
    assert (config.seed, config.data.source, config.data.validation_fold) == (2, "b", None)
    assert (config.method.embedding_dim, config.method.samples_per_class) == (8, 3)  # type: ignore[attr-defined]
    above = load_config(write(tmp_path / "r.yaml", "preset: m/leaf\nseed: 9\n"))
    assert above.seed == 9 and above.data == config.data and above.method == config.method
    assert load_config(write(tmp_path / "r.yaml", "preset: m/_base\nseed: 9\n")).data.source == "a"
    for base in ("_all", "m/_base"):
        with pytest.raises(UserError, match=f"'{base}' is neither a file nor a preset; .*'?m/leaf"):
            load_config(base)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a": "b", "b": "c", "c": "b"}, "presets build on each other in a circle: a -> b -> c -> b"),
        ({"a": "a"}, "presets build on each other in a circle: a -> a"),
        ({"a": "z"}, "preset 'z' does not exist; presets: a"),
    ],
    ids=["circle", "itself", "missing"],
)
def test_bad_presets(files: dict[str, str], says: str, presets: Path) -> None:
    for name, base in files.items():
        write(presets / f"{name}.yaml", f"preset: {base}\n")
    with pytest.raises(UserError) as caught:
        load_config("a")
    assert str(caught.value) == says


def test_missing_recipe_names_the_nearest_preset() -> None:
    with pytest.raises(
        UserError, match="'baselin/emoji' is neither a file nor a preset; did you mean the preset 'baseline/emoji'"
    ):
        load_config("baselin/emoji")
    with pytest.raises(UserError, match=r"presets: .*baseline/emoji"):
        load_config("qqq")


# ---- what may change -------------------------------------------------------------------------------------------------

CHANGES = {
    "length=7 epochs": True,
    "storage=/elsewhere": True,
    "checkpoint.keep=5": True,
    "checkpoint.every=3 steps": True,
    "runtime.workers=3": True,
    "runtime.loader=in_process": True,
    "cache.folder=/c": True,
    "evaluation.batch_size=3": True,
    "seed=1": False,
    "name=other": False,
    "precision=bf16": False,
    "data.source=/d": False,
    "data.transforms.flip=0.5": False,
    "model.pooling=max": False,
    "method.loss_args={alpha: 3}": False,
    "method.optimizer.lr=1": False,
    "evaluation.recall_at=[1]": False,
    "evaluation.clustering=false": False,
}


@pytest.mark.parametrize("override", CHANGES)
def test_differences_tell_runtime_keys_from_others(override: str) -> None:
    base, changed = load_config(), load_config(None, [override])
    found = {
        runtime: differences(base.model_dump(mode="json"), changed.model_dump(mode="json"), runtime)
        for runtime in (True, False)
    }
    is_runtime = CHANGES[override]
    assert found[is_runtime] and not found[not is_runtime]
    assert all(line.startswith(override.split("=")[0]) and " -> " in line for line in found[is_runtime])


def test_differences_show_old_and_new() -> None:
    lines = differences(
        dump(load_config()), dump(load_config(None, ["method.optimizer.lr=0.25", "seed=4"])), runtime=False
    )
    assert lines == ["method.optimizer.lr: 0.0005 -> 0.25", "seed: 0 -> 4"]


def test_validates() -> None:
    assert not load_config().validates
    assert load_config(None, ["data.validation_fold=2"]).validates
    assert load_config(None, ["protocol=paper"]).validates


def test_root_is_storage_or_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDML_HOME", "/somewhere")
    assert load_config().root == "/somewhere" and load_config(None, ["storage=s3://b/x"]).root == "s3://b/x"
    monkeypatch.delenv("RAYDML_HOME")
    monkeypatch.setenv("HOME", "/house")
    assert load_config().root == "/house/raydml"


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """(key, description) of every key of a config model."""
    for name, field in model.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        if is_section and field.annotation is not Length:
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.description


def test_every_key_has_a_description_that_stands_by_itself() -> None:
    keys = [key for model in (Config, *(method.Config for method in METHODS.values())) for key in leaves(model)]
    assert len(keys) > 150
    bad = [key for key, text in keys if key.rsplit(".")[-1] != "name" and (not text or text.startswith("of "))]
    assert not bad


def test_config_is_frozen_and_finite() -> None:
    config = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    with pytest.raises(UserError, match="finite"):
        build_config({"data": {"transforms": {"rotate": math.nan}}})
