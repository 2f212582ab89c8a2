"""Which trackers a config names, and what is told of them before a run starts."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import train
from pipeline.config import Config, build_config
from pipeline.data.store import Store
from pipeline.diagnosis.recipe_rows import check_recipe
from pipeline.errors import UserError
from pipeline.testing.tiny import tiny_values
from pipeline.trackers.choose import check_trackers, make_trackers
from tests.pipeline.tuning.sweeps import tiny_sweep

OWN = "tests.pipeline.trackers.own"
Make = Callable[..., Config]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_names_alone_and_with_arguments(make_config: Make) -> None:
    config = make_config({"tracking": f"mlflow, {OWN}:Remembers"})
    assert [entry.name for entry in config.tracking] == ["mlflow", f"{OWN}:Remembers"]
    entries = ["wandb", {"name": "mlflow", "args": {"experiment": "shoes"}}]
    assert make_config({"tracking": entries}).tracking[1].args == {"experiment": "shoes"}
    assert make_config().tracking == () and make_trackers(make_config()) == {}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("wandbb", "tracker 'wandbb' is unknown: did you mean 'wandb'"),
        ({"name": "wandb", "args": {"api_key": "x"}}, "args.api_key of wandb looks like a secret"),
        ({"name": "mlflow", "args": {"MyToken": "x"}}, "has no argument 'MyToken': expected experiment"),
        ({"name": "wandb", "args": {"projekt": "x"}}, "wandb has no argument 'projekt': expected project, "),
        (
            {"name": "mlflow", "args": {"tracking_uri": "http://me:s3cr3t@host"}},
            r"the address 'http://\*\*\*@host' holds",
        ),
        ("wandb", "wandb has no API key: run `wandb login`, or set WANDB_API_KEY"),
        ({"name": "wandb", "args": {"mode": "disabled"}}, "mode 'disabled' of wandb keeps nothing"),
        (
            {"name": "mlflow", "args": {"tracking_uri": "http://127.0.0.1:9"}},
            "server at http://127.0.0.1:9 does not answer",
        ),
        ({"name": "mlflow", "args": {"tracking_uri": "nowhere://x"}}, "MLflow's store nowhere://x cannot be opened"),
        ("tests.nowhere:X", "tracker 'tests.nowhere:X': there is no module"),
        (f"{OWN}:Refuses", "cannot be made: RuntimeError: cannot be made .own.py, line"),
        (f"{OWN}:LacksMethods", "makes a LacksMethods, expected the methods start, log and finish"),
        ({"name": f"{OWN}:Remembers", "args": {"x": 1}}, "cannot be made: TypeError: .*unexpected keyword"),
    ],
)
def test_what_cannot_work_is_one_line(make_config: Make, entry: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        check_trackers(make_config({"tracking": [entry]}))
    assert "s3cr3t" not in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_folder_as_mlflows_store_is_told_how_to_allow(make_config: Make, tmp_path: Path) -> None:
    entry = {"name": "mlflow", "args": {"tracking_uri": str(tmp_path / "mlruns")}}
    with pytest.raises(UserError, match=r"MLFLOW_ALLOW_FILE_STORE=true for a folder; or use sqlite:///PATH$"):
        check_trackers(make_config({"tracking": [entry]}))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing(make_config: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else find(wanted))
    with pytest.raises(UserError, match=rf"^tracking: {name} is not installed: pip install 'raydml\[{name}\]'$"):
        check_trackers(make_config({"tracking": [name]}))


def test_what_works_is_not_refused(make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    both = make_config({"tracking": ["wandb", "mlflow"]})
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(both)
    assert not list(tmp_path.glob("mlflow*")), "nothing is made by a check"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    check_trackers(both)
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    check_trackers(both)
    with pytest.raises(UserError, match="names mlflow twice"):
        check_trackers(make_config({"tracking": ["mlflow", "mlflow"]}))


def test_object_storage_needs_a_place_of_its_own(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name, says in (("wandb", "set WANDB_DIR"), ("mlflow", "set MLFLOW_TRACKING_URI")):
        with pytest.raises(UserError, match=says):
            check_trackers(make_config({"tracking": [name], "storage": "s3://bucket"}))
    monkeypatch.setenv("WANDB_DIR", "/tmp")
    check_trackers(make_config({"tracking": ["wandb"], "storage": "s3://bucket"}))


def test_commands_tell_it_before_they_start(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_values(str(tmp_path), store.folder.uri, {"tracking": ["wandb"]})))
    assert train.main([str(recipe)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: tracking: wandb has no API key")
    assert not (tmp_path / "runs" / "tiny" / "config.yaml").exists()
    (row,) = [
        row for row in check_recipe(build_config(yaml.safe_load(recipe.read_text()))).rows if row.check == "tracking"
    ]
    assert row.status == "fails" and "wandb has no API key" in row.change


def test_a_sweep_tells_it_before_its_first_trial(store: Store, tmp_path: Path) -> None:
    from pipeline.tuning.checks import check_sweep

    with pytest.raises(UserError, match="wandb has no API key"):
        check_sweep(tiny_sweep(tmp_path, store, settings={"tracking": ["wandb"]}))
