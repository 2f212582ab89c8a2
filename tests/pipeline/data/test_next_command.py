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
        ({f"c{i:02d}": 3 for i in range(80)}, ["length=20 epochs"]),  # 30 in a training fold's complement
        ({f"c{i:02d}": 3 for i in range(32)}, ["method.classes_per_batch=12", "length=20 epochs"]),
        ({f"c{i:02d}": 3 for i in range(24)}, ["data.validation_fold=null", "evaluation.checkpoint=last", "method.classes_per_batch=12", "length=20 epochs"]),
        ({f"c{i:02d}": 1 + (i > 11) for i in range(24)}, None),
        ({f"c{i}": 4 for i in range(4)}, ["data.validation_fold=null", "evaluation.checkpoint=last", "method.classes_per_batch=2", "length=20 epochs"]),
    ],
    ids=["many", "few", "a fold of three classes", "single images", "two training classes"],
)  # fmt: skip
def test_it_fits_the_set(classes: dict[str, int], given: list[str] | None, cli: Cli, tmp_path: Path) -> None:
    write_images(tmp_path / "my photos", classes, 0)
    status, said = cli("folder", str(tmp_path / "my photos"))
    settings = command_of(said)
    assert status == 0 and settings[:2] == ["name=my-photos", 'data.source="my photos"']
    assert given is None or settings[2:] == given
    folder = Folder(tmp_path / "home/data/my photos")
    config = load_config("baseline/photos", [*settings, "model.weights=none"])
    shape = check_run(config, Store(folder)).epoch_shape
    assert shape is not None and shape[1] == config.method.classes_per_batch * 4


def test_elsewhere_it_is_named_by_its_place_and_large_sets_take_fewer_epochs(cli: Cli, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", {f"c{i:02d}": 51 for i in range(80)}, 0, side=8)
    said = cli("folder", str(tmp_path / "photos"), "--to", str(tmp_path / "other place"))[1]
    assert f'data.source="{tmp_path}/other place"' in command_of(said) and "length=16 epochs" in command_of(said)


def test_without_training_images_there_is_none(cli: Cli, tmp_path: Path) -> None:
    write_images(tmp_path / "photos/test", {"a": 2, "b": 2}, 0)
    status, said = cli("folder", str(tmp_path / "photos"))
    assert status == 0 and "next:" not in said


def test_re_identification_is_chosen_by_its_own_metric(cli: Cli, tmp_path: Path) -> None:
    images = write_images(tmp_path / "photos", {f"c{i:02d}": 4 for i in range(24)}, 0)
    lines = ["path,label,split,camera"]
    for i, (path, name) in enumerate(images):
        split = "train" if int(name[1:]) < 12 else ("query", "gallery")[i % 2]
        lines.append(f"{path},{name},{split},{i % 3}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    status, said = cli("csv", str(tmp_path / "list.csv"))
    settings = command_of(said)
    assert status == 0 and "evaluation.metric=map" in settings
    check_run(
        load_config("baseline/photos", [*settings, "model.weights=none"]), Store(Folder(tmp_path / "home/data/list"))
    )


@pytest.mark.parametrize("name", ["2024-05-01", "on", "1e3", "0x10", "photos #1", "a: b", "[cats]", "@me", "{x}"])
def test_names_that_yaml_would_read_otherwise(name: str, cli: Cli, tmp_path: Path) -> None:
    write_images(tmp_path / name, {f"c{i:02d}": 2 for i in range(8)}, 0)
    said = cli("folder", str(tmp_path / name))[1]
    config = load_config("baseline/photos", [*command_of(said), "model.weights=none"])
    assert config.data.source == name


@pytest.mark.parametrize(
    "classes",
    [
        {"train/a": 3, "train/b": 1, "test/c": 2, "test/d": 2},
        {"train/a": 3, "train/b": 3, "train/e": 3, "train/f": 3, "test/c": 1, "test/d": 1},
        {"train/a": 3, "train/b": 3, "train/e": 3, "train/f": 3, "test/c": 5},
    ],
    ids=["one class to train on", "nothing to find", "one test class"],
)
def test_there_is_none_where_a_run_would_be_refused(classes: dict[str, int], cli: Cli, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", classes, 0)
    status, said = cli("folder", str(tmp_path / "photos"))
    assert status == 0 and "next:" not in said
