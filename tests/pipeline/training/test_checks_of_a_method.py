"""What a run checks of its method and dataset before it starts, and what it says of steps that changed nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.data.entries import Entry
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.errors import UserError
from pipeline.runs.summary import warnings
from pipeline.storage import Folder
from pipeline.testing.tiny import write_images
from pipeline.training.checks import check_run


@pytest.mark.parametrize(
    ("every", "fine"), [("4 epochs", False), ("2 epochs", True), ("1 steps", True), ("500 steps", False)]
)
def test_best_weights_have_to_be_known_when_a_method_returns_to_them(
    make_config: Callable[..., Config], store: Store, every: str, fine: bool
) -> None:
    method = {
        "name": "intra_batch",
        "embedding_dim": 8,
        "heads": 2,
        "classes_per_batch": 4,
        "samples_per_class": 3,
        "reload_best": [2, 5],
    }
    config = make_config({"method": method, "evaluation.every": every, "length": "9 epochs"})
    if fine:
        check_run(config, store)
    else:
        with pytest.raises(
            UserError, match=f"returns to the best weights after 2 epochs, but evaluation.every is {every}"
        ):
            check_run(config, store)


def test_a_rate_of_parameters_that_do_not_exist_is_one_line(make_config: Callable[..., Config], store: Store) -> None:
    with pytest.raises(
        UserError, match="method: loss_lr_multiplier is 7, but this optimizer has no parameters of the loss"
    ):
        check_run(make_config({"method.loss": "ContrastiveLoss", "method.optimizer.loss_lr_multiplier": 7}), store)


def test_a_memory_that_is_too_small_for_the_warm_up_is_one_line(
    make_config: Callable[..., Config], store: Store
) -> None:
    method = {
        "name": "mmsi",
        "embedding_dim": 8,
        "meta_classes": 3,
        "classes_per_batch": 2,
        "samples_per_class": 4,
        "memory_total": 8,
    }
    with pytest.raises(UserError, match="method: memory_total is 8, which holds 2 classes of 4 images"):
        check_run(make_config({"method": method, "model.batch_norm": "frozen"}), store)


def test_a_long_epoch_is_told(make_config: Callable[..., Config], tmp_path: Path) -> None:
    classes = {"many": 60} | {f"few{i}": 3 for i in range(8)}
    images = write_images(tmp_path / "images", classes, 0)
    entries = [Entry(path, name, "train") for path, name in images]
    store = write_store("tail", entries, Folder(tmp_path / "tail"), run_serially, num_folds=2)
    config = make_config(
        {
            "data.validation_fold": None,
            "method.classes_per_batch": 6,
            "evaluation.test": False,
            "evaluation.checkpoint": "last",
        }
    )
    notes = check_run(config, store).notes
    assert any(
        "times the 84 training images: the largest class has 60 of them, the median class 3" in n for n in notes
    ), notes
    even = {f"class{i}": 6 for i in range(12)}
    entries = [Entry(path, name, "train") for path, name in write_images(tmp_path / "even", even, 0)]
    notes = check_run(config, write_store("even", entries, Folder(tmp_path / "uniform"), run_serially)).notes
    assert notes[0] == "an epoch has 4 steps of 18 images, 1.0 times the 72 training images"


@pytest.mark.parametrize(
    ("summary", "says"),
    [
        ({"step": 30, "skipped": {"the memory was empty": 30}}, "warning: 30 of 30 steps changed no weight, nothing was trained: 30 times the memory was empty"),
        ({"step": 30, "skipped": {"a": 10}, "skipped_steps": 6}, "16 of 30 steps changed no weight, most of the run trained nothing: 10 times a; 6 times loss or gradient was not finite"),
        ({"step": 30, "skipped": {"a": 15}}, None),
        ({"step": 30, "skipped_steps": 0}, None),
        ({"step": 30}, None),
    ],
)  # fmt: skip
def test_a_run_that_trained_nothing_says_so(summary: dict[str, Any], says: str | None) -> None:
    lines = list(warnings({"frozen": {}, "final": {}, "validation": {}} | summary))
    assert lines == [] if says is None else len(lines) == 1 and says in lines[0]


@pytest.mark.parametrize(
    ("summary", "says"),
    [
        ({"final": {"map@r": 20.0, "recall@1": 9.0}}, "warning: training made it worse: recall@1 is 9.00 on the test classes, 10.00 of the backbone before training"),
        ({"final": {"map@r": 1.0, "recall@1": 10.0}}, None),
        ({"validation": {"recall@1": 7.0}}, "recall@1 is 7.00 in the best validation, 8.00 of the backbone before training"),
        ({"validation": {"recall@1": 8.5}, "final": {"recall@1": 11.0}}, None),
        ({"frozen": {"queries": 0.0}, "final": {}, "validation": {}}, None),
    ],
)  # fmt: skip
def test_a_run_that_is_worse_than_its_backbone_says_so(summary: dict[str, Any], says: str | None) -> None:
    whole = {"frozen": {"recall@1": 10.0}, "frozen_validation": {"recall@1": 8.0}, "final": {}, "validation": {}}
    lines = list(warnings({"step": 9, "metric": "recall@1"} | whole | summary))
    assert lines == [] if says is None else len(lines) == 1 and says in lines[0]
    assert not list(warnings({k: v for k, v in ({"step": 9} | whole | summary).items() if k != "frozen_validation"}))
