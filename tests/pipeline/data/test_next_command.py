"""What `prepare folder` and `prepare csv` print as the next command: it trains on the set as it is."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pipeline.data.store import Store
from pipeline.recipes import load_config
from pipeline.storage import Folder
from pipeline.testing.tiny import write_images
from pipeline.training.checks import check_run
from tests.pipeline.conftest import Cli


def command_of(said: str) -> list[str]:
    (line,) = (line for line in said.splitlines() if line.startswith("next: "))
    words = shlex.split(line.removeprefix("next: "))
    assert words[:4] == ["python", "-m", "pipeline.train", "baseline/photos"] and set(words[4::2]) == {"--set"}
    return words[5::2]


@pytest.mark.parametrize(
    ("classes", "given"),
    [
        ({f"c{i:02d}": 3 for i in range(80)}, ["length=40 epochs"]),  # 30 in a training fold's complement
        ({f"c{i:02d}": 3 for i in range(24)}, ["method.classes_per_batch=9", "length=40 epochs"]),
        ({f"c{i:02d}": 1 + (i > 11) for i in range(24)}, None),
        ({f"c{i}": 4 for i in range(4)}, ["data.validation_fold=null", "evaluation.checkpoint=last", "method.classes_per_batch=2", "length=40 epochs"]),
    ],
    ids=["many", "few", "single images", "two training classes"],
)  # fmt: skip
def test_it_fits_the_set(classes: dict[str, int], given: list[str] | None, cli: Cli, tmp_path: Path) -> None:
    write_images(tmp_path / "my photos", classes, 0)
    status, said = cli("folder", str(tmp_path / "my photos"))
    settings = command_of(said)
    assert status == 0 and settings[:2] == ["name=my-photos", "data.source=my photos"]
    assert given is None or settings[2:] == given
    folder = Folder(tmp_path / "home/data/my photos")
    config = load_config("baseline/photos", [*settings, "model.weights=none"])
    shape = check_run(config, Store(folder)).epoch_shape
    assert shape is not None and shape[1] == config.method.classes_per_batch * 4


def test_elsewhere_it_is_named_by_its_place_and_large_sets_take_fewer_epochs(cli: Cli, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", {f"c{i:02d}": 51 for i in range(80)}, 0, side=8)
    said = cli("folder", str(tmp_path / "photos"), "--to", str(tmp_path / "other place"))[1]
    assert f"data.source={tmp_path}/other place" in command_of(said) and "length=29 epochs" in command_of(said)


def test_without_training_images_there_is_none(cli: Cli, tmp_path: Path) -> None:
    write_images(tmp_path / "photos/test", {"a": 2, "b": 2}, 0)
    status, said = cli("folder", str(tmp_path / "photos"))
    assert status == 0 and "next:" not in said
