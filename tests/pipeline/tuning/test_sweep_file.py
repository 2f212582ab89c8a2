"""Sweep files: what is read, what `--set` changes, what is refused, and what may change between two starts of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.storage import Folder
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_file import check_same_sweep, dump_sweep, load_sweep, method_values, read_sweep

TEXT = """
# A small sweep. With a comment.
methods:
  margin:
    recipe: own.yaml
    settings: {method.loss: TripletMarginLoss}
    space: {method: {loss_args: {margin: {log_uniform: [0.02, 0.3]}}}}
    points: [{method.loss_args.margin: 0.1, method.optimizer.lr: 5e-4}]
  similarity:
    recipe: baseline/emoji
settings: {length: 2 epochs, runtime: {loader: in_process}}
space:
  method.optimizer.lr: {log_uniform: [1e-4, 3e-3]}
metric: R@1
"""


def write(folder: Path, changes: dict[str, Any] | None = None) -> str:
    (folder / "own.yaml").write_text("preset: baseline/emoji\nseed: 3\n")
    values = yaml.safe_load(TEXT.replace("5e-4", "5.0e-4").replace("1e-4", "1.0e-4").replace("3e-3", "3.0e-3"))
    (folder / "small.yaml").write_text(yaml.safe_dump({**values, **(changes or {})}, sort_keys=False))
    return str(folder / "small.yaml")


@pytest.fixture
def sweep(tmp_path: Path) -> SweepConfig:
    return load_sweep(write(tmp_path))


def test_a_sweep_file_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "text.yaml").write_text(TEXT)  # exponents as recipes have them
    sweep = load_sweep(str(tmp_path / "text.yaml"))
    assert sweep.name == "text" and sweep.metric == "recall@1"
    assert sweep.methods["margin"].recipe == str(tmp_path / "own.yaml")
    assert sweep.methods["similarity"].recipe == "baseline/emoji"
    assert sweep.methods["margin"].space == {"method.loss_args.margin": {"log_uniform": [0.02, 0.3]}}
    assert sweep.space == {"method.optimizer.lr": {"log_uniform": [1e-4, 3e-3]}}
    assert sweep.methods["margin"].points[0]["method.optimizer.lr"] == 5e-4


def test_it_is_read_back_equal(sweep: SweepConfig, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "folder")
    folder.write("sweep.yaml", dump_sweep(sweep).encode())
    assert read_sweep(folder) == sweep
    folder.write("sweep.yaml", b"methods: 3\n")
    with pytest.raises(
        UserError, match=r"sweep\.yaml was written by another version.*start the sweep under another name"
    ):
        read_sweep(folder)


def test_set_changes_keys_of_the_sweep_and_of_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path)
    sweep = load_sweep(
        path,
        [
            "budget.trials=5",
            "settings.length=1 epochs",
            "settings.runtime.loader=ray",
            "methods.margin.settings.method.embedding_dim=32",
            "space.method.optimizer.lr={log_uniform: [1e-5, 1e-4]}",
            "methods.similarity.space.method.embedding_dim=[8, 16]",
            "name=other",
            "final.settings.method.loss_args.margin=0.2",
        ],
    )
    assert sweep.name == "other" and sweep.budget.trials == 5
    values = method_values(sweep, "margin")
    assert (values["length"], values["runtime"]["loader"], values["method"]["embedding_dim"]) == ("1 epochs", "ray", 32)
    assert values["method"]["loss"] == "TripletMarginLoss" and "loss_args" not in values["method"]
    assert sweep.space == {"method.optimizer.lr": {"log_uniform": [1e-5, 1e-4]}}
    assert sweep.methods["similarity"].space == {"method.embedding_dim": [8, 16]}
    assert sweep.final is not None and sweep.final.settings == {"method.loss_args.margin": 0.2}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"budgt": {}}, "unknown key 'budgt': did you mean 'budget'?"),
        ({"budget": {"trails": 3}}, "unknown key 'budget.trails': did you mean 'budget.trials'?"),
        ({"length": "3 epochs"}, "unknown key 'length': keys of the recipe stand below settings"),
        ({"methods": {"a": {"recpe": "x"}}}, "methods.a: unknown key 'recpe': did you mean 'recipe'?"),
        (
            {"methods": {"a": {"length": "x"}}},
            "unknown key 'methods.a.length': keys of the recipe stand below methods.a",
        ),
        ({"methods": {1: {"recpe": "x"}}}, "methods.1: unknown key 'recpe': did you mean 'recipe'?"),
        ({"methods": ["a"]}, "methods: got ['a'], expected keys and values"),
        ({"methods": {}}, "methods: got {}"),
        ({"methods": {"a": None}}, "methods.a: got None, expected keys and values"),
        ({"searcher": {"name": "bayes"}}, "searcher.name: got 'bayes'"),
        ({"budget": {"trials": 0}}, "budget.trials: got 0"),
        ({"folds": []}, "folds: got []"),
        ({"space": {"method.optimizer.lr": {"log_unifrom": [1, 2]}}}, "'log_unifrom' is no distribution"),
        ({"name": "a b"}, "name: got 'a b'"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_sweep(write(tmp_path, changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(UserError, match=r"there is no sweep file '.*smal\.yaml': did you mean '.*small\.yaml'"):
        load_sweep(path.replace("small", "smal"))
    with pytest.raises(UserError, match="is neither a file nor shipped with the program"):
        load_sweep("no_such_sweep")
    with pytest.raises(UserError, match="is a folder, expected a YAML file"):
        load_sweep(str(tmp_path))
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(UserError, match="is empty: write keys and values, for example `methods:"):
        load_sweep(str(tmp_path / "empty.yaml"))
    with pytest.raises(UserError, match=r"methods\.a\.recipe: there is no file '.*there/mine\.yaml'"):
        load_sweep(write(tmp_path, {"methods": {"a": {"recipe": "there/mine.yaml"}}}))
    with pytest.raises(UserError, match=r"methods\.a\.recipe: recipe 'baseline/emjoi' .* did you mean the preset"):
        load_sweep(write(tmp_path, {"methods": {"a": {"recipe": "baseline/emjoi"}}}))
    with pytest.raises(UserError, match=r"methods\.a\.values is filled in by the program"):
        load_sweep(write(tmp_path, {"methods": {"a": {"values": {"seed": 1}}}}))


def changed(sweep: SweepConfig, tmp_path: Path, overrides: list[str]) -> list[str]:
    return check_same_sweep(sweep, load_sweep(str(tmp_path / "small.yaml"), overrides))


def test_a_sweep_may_grow(sweep: SweepConfig, tmp_path: Path) -> None:
    assert changed(sweep, tmp_path, []) == []
    assert changed(sweep, tmp_path, ["budget.trials=50"]) == ["budget.trials: None -> 50"]
    assert len(changed(sweep, tmp_path, ["methods.similarity.points=[{method.optimizer.lr: 1e-3}]"])) == 1
    assert changed(sweep, tmp_path, ["final.seeds=[4, 3, 2, 1, 0, 7]"])[0].startswith(
        "final.seeds: [0, 1, 2, 3, 4] -> "
    )
    assert changed(sweep, tmp_path, ["final=null"]) and check_same_sweep(
        load_sweep(str(tmp_path / "small.yaml"), ["final=null"]), sweep
    )
    assert changed(sweep, tmp_path, ["methods.new.recipe=mmsi/emoji"]) == ["methods.new: left out -> compared"]
    assert len(changed(sweep, tmp_path, ["settings.runtime.cpus_per_worker=2", "retries=9"])) == 3
    moved = sweep.methods["margin"].model_copy(update={"recipe": "/elsewhere/own.yaml"})
    assert changed(sweep.model_copy(update={"methods": {**sweep.methods, "margin": moved}}), tmp_path, []) == []


@pytest.mark.parametrize(
    "override, message",
    [
        ("settings.length=3 epochs", "methods.similarity.settings.length: 2 epochs -> 3 epochs"),
        ("final.seeds=[1, 2]", "final.seeds: [0, 1, 2, 3, 4] -> [1, 2]"),
        ("final.classes=folds", "final.classes: all -> folds"),
        ("settings.length=1 epochs", "methods.margin.settings.length: 2 epochs -> 1 epochs"),
        ("settings.length=300 steps", "settings.length: 2 epochs -> 300 steps"),
        ("searcher.seed=1", "searcher.seed: 0 -> 1"),
        ("protocol=paper", "protocol: fair -> paper"),
        ("metric=map@r", "metric: recall@1 -> map@r"),
        ("folds=[0, 1]", "folds: [0] -> [0, 1]"),
        ("space.method.embedding_dim=[8, 16]", "methods.margin.space.method.embedding_dim: None -> [8, 16]"),
        ("settings.method.embedding_dim=8", "methods.margin.settings.method.embedding_dim: 128 -> 8"),
        ("methods.similarity.recipe=mmsi/emoji", "methods.similarity.recipe: baseline/emoji -> mmsi/emoji"),
        ("methods.margin.points=[]", "methods.margin.points: [{"),
        ("methods={similarity: {recipe: baseline/emoji}}", "methods.margin: compared -> left out"),
    ],
)
def test_another_sweep_needs_another_name(sweep: SweepConfig, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        changed(sweep, tmp_path, [override])
    assert "the name small belongs to a sweep of other settings" in str(error.value)
    assert message in str(error.value) and "--set name=small-" in str(error.value)


def test_a_recipe_that_has_changed_makes_another_sweep(sweep: SweepConfig, tmp_path: Path) -> None:
    """Its content is the sweep's: the file may be missing where trials run, or change between two starts."""
    (tmp_path / "own.yaml").write_text("preset: baseline/emoji\nmethod: {embedding_dim: 64}\n")
    assert method_values(sweep, "margin")["seed"] == 3
    changed_recipe = load_sweep(str(tmp_path / "small.yaml"))
    with pytest.raises(UserError, match=r"methods\.margin\.settings\.method\.embedding_dim: 128 -> 64"):
        check_same_sweep(sweep, changed_recipe)
    (tmp_path / "own.yaml").unlink()
    assert method_values(sweep, "margin")["method"]["embedding_dim"] == 128
