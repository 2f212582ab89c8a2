"""Methods, losses, backbones and transforms of a user's own, from the recipe's folder: trained, continued, measured, refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from methods import Method, plugins
from pipeline import evaluate, train
from pipeline.config import build_config
from pipeline.errors import UserError
from tests.pipeline.conftest import Base
from tests.pipeline.training.conftest import assert_one_error

OWN = """
import torch
from torch import nn
from methods import Method, MethodConfig
from methods.base import Context

class MineConfig(MethodConfig):
    name: str = "mine"
    temperature: float = 0.1

class Mine(Method):
    Config = MineConfig
    def loss(self, embeddings, labels, context):
        same = (labels[:, None] == labels[None]).to(embeddings.dtype)
        return nn.functional.cross_entropy(embeddings @ embeddings.T / self.config.temperature, same / same.sum(1, keepdim=True))

class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.num_features = width
        self.conv = nn.Conv2d(3, width, 3, stride=2)
    def forward(self, x):
        return self.conv(x).relu().permute(0, 2, 3, 1)

class Fails(nn.Module):
    calls = 0
    def forward(self, embeddings, labels):
        Fails.calls += 1
        if Fails.calls > 4:
            raise ValueError("two embeddings are equal")
        return embeddings.square().sum() + embeddings.mean()

def augment(image, size, random):
    top = int(random.integers(0, 3))
    return nn.functional.interpolate(image[None, :, top:].float(), size=(size, size)).to(torch.uint8)[0]

def plain(image, size):
    return nn.functional.interpolate(image[None].float(), size=(size, size)).to(torch.uint8)[0]

def small(image, size):
    return image[:, :4, :4]

def not_a_network():
    return 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_code_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.setenv(plugins.FOLDERS, "")
    monkeypatch.setattr(plugins, "loaded", False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def changes(own: str) -> dict[str, Any]:
    return {
        "data.transforms": {"size": 24, "training": f"{own}:augment", "evaluation": f"{own}:plain"},
        "model": {"backbone": f"{own}:Net", "weights": "none", "backbone_args": {"width": 12}},
        "method": {"name": f"{own}:Mine", "temperature": 0.2, "classes_per_batch": 4, "samples_per_class": 3},
        "name": "own",
    }


def test_a_run_of_own_code_from_the_recipes_folder(
    own: str, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(Path(base.recipe(changes(own))).read_text())
    assert train.main([str(recipe)]) == 0, capsys.readouterr().err
    capsys.readouterr()
    values = yaml.safe_load((base.root / "runs" / "own" / "config.yaml").read_text())
    assert values["method"]["name"] == f"{own}:Mine" and values["method"]["temperature"] == 0.2
    monkeypatch.setenv(plugins.FOLDERS, "")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    del sys.modules[own]
    assert evaluate.main([str(base.root / "runs" / "own")]) == 0, "the run knows the folder of its modules"


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"method": {"name": "{own}:Mime"}}, "method '{own}:Mime': {own} ({file}) has no 'Mime': did you mean 'Mine'?"),
        (
            {"method": {"name": "{own}:Net"}},
            "method '{own}:Net' is the class Net, expected a class derived from methods.base",
        ),
        ({"method": {"name": "{own}x:Mine"}}, "there is no module '{own}x' in "),
        ({"method": {"name": "{own}:Mine", "temprature": 1}}, "unknown key 'method.temprature': did you mean"),
        ({"data": {"transforms": {"training": "{own}:augmnt"}}}, "has no 'augmnt': did you mean 'augment'?"),
        (
            {"data": {"transforms": {"evaluation": "{own}:small"}}},
            "gives torch.uint8 [3, 4, 4], expected torch.uint8 [3, 224",
        ),
        ({"data": {"transforms": {"training": "{own}:plain"}}}, "takes 2 positional arguments but 3 were given"),
    ],
)
def test_wrong_names_are_one_line(own: str, section: dict[str, Any], says: str, tmp_path: Path) -> None:
    plugins.add_folder(tmp_path)
    values = yaml.safe_load(yaml.safe_dump(section).replace("{own}", own))
    with pytest.raises(UserError) as caught:
        build_config(values)
    assert says.replace("{own}", own).replace("{file}", str(tmp_path / f"{own}.py")) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"backbone": "{own}:Nett", "weights": "none"}, "has no 'Nett': did you mean 'Net'?"),
        ({"backbone": "{own}:Net"}, "has no download: set model.weights to a file, or to none"),
        ({"backbone": "{own}:not_a_network", "weights": "none"}, "gives a int, expected a torch.nn.Module"),
        ({"backbone": "{own}:Net", "weights": "none", "backbone_args": {"wide": 3}}, "cannot be built: TypeError: "),
        ({"backbone": "{own}:Net", "weights": "none", "pooling": "native"}, "set model.pooling to avg"),
    ],
)
def test_wrong_backbones_are_one_line(
    own: str, model: dict[str, Any], says: str, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = tmp_path / "own.yaml"
    model = yaml.safe_load(yaml.safe_dump(model).replace("{own}", own))
    recipe.write_text(Path(base.recipe({"name": "bad", "model": model})).read_text())
    assert_one_error((train.main([str(recipe)]), *capsys.readouterr()), 2, says)


def test_an_error_in_an_own_loss_names_line_step_and_samples(
    own: str, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = tmp_path / "own.yaml"
    method = {"loss": f"{own}:Fails", "loss_args": {}, "classes_per_batch": 4, "samples_per_class": 3}
    recipe.write_text(Path(base.recipe({"name": "fails", "method": {"name": "baseline", **method}})).read_text())
    outcome = (train.main([str(recipe)]), *capsys.readouterr())
    assert_one_error(outcome, 1, "Fails failed on a batch of 12 embeddings: ValueError: two embeddings are equal")
    assert f"({own}.py, line " in outcome[2] and "sample ids " in outcome[2] and "step " in outcome[2]


def test_methods_of_installed_packages(own: str, tmp_path: Path) -> None:
    info = tmp_path / "some_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[raydml.methods]\nmine_installed = {own}:Mine\nbroken_one = {own}:Nothing\n"
    )
    plugins.add_folder(tmp_path)
    config = build_config({"method": {"name": "mine_installed", "temperature": 0.3}})
    assert config.method.name == "mine_installed" and config.model_dump(mode="json")["method"]["temperature"] == 0.3
    from methods import method_class

    assert issubclass(method_class("mine_installed"), Method)
    with pytest.raises(UserError, match=r"the entry point .* has no 'Nothing'"):
        build_config({"method": {"name": "broken_one"}})
    with pytest.raises(UserError, match=r"did you mean 'mine_installed'"):
        build_config({"method": {"name": "mine_instaled"}})


@pytest.mark.parametrize(
    "method", ['{name: baseline, loss: "mine:PairLoss", loss_args: {scale: 8}}', '{name: "mine:Pairs", scale: 8}']
)
def test_the_example_of_the_documentation_trains(
    method: str, own: str, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "tutorials" / "own-code.md").read_text()
    assert f"`method: {method}`" in page
    (tmp_path / "mine.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    values = yaml.safe_load(method) | {"classes_per_batch": 4, "samples_per_class": 3, "embedding_dim": 8}
    recipe = tmp_path / "mine.yaml"
    name = f"mine-{values['name'].partition(':')[0]}"
    recipe.write_text(Path(base.recipe({"name": name, "length": "2 steps", "method": values})).read_text())
    assert train.main([str(recipe)]) == 0, capsys.readouterr().err
    sys.modules.pop("mine", None)
