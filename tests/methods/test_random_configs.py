"""Whatever a method's configuration accepts makes a step: random settings of every method, one step of the real loop each.

Settings that are refused have to be refused in one line, before the step.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from methods import METHODS
from methods.config import Length
from pipeline.config import build_config
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.testing.tiny import tiny_values
from pipeline.testing.watched_run import make_worker
from pipeline.training.checks import check_run

EVERY_DAY, SLOW = 4, 340  # settings of each method: 24, and 2,040
# Free text, and what costs time rather than being right or wrong.
CHOICES: dict[str, list[Any]] = {
    "loss": ["MultiSimilarityLoss", "ContrastiveLoss", "TripletMarginLoss", "NTXentLoss", "ProxyAnchorLoss", "SoftTripleLoss", "MarginLoss",
             "CircleLoss", "NormalizedSoftmaxLoss", "ArcFaceLoss", "NCALoss", "SupConLoss", "ThresholdConsistentMarginLoss"],
    "miner": [None, "MultiSimilarityMiner", "TripletMarginMiner", "BatchHardMiner"],
    "loss_args": [{}], "miner_args": [{}], "reload_best": [[]], "matryoshka": [None, [2], [2, 4]],
}  # fmt: skip


def draw(field: FieldInfo, name: str, source: random.Random) -> Any:
    """A random value of a field, small and within its bounds."""
    if name in CHOICES and (field.annotation is str or name != "loss"):
        return source.choice(CHOICES[name])
    annotation: Any = field.annotation
    if get_origin(annotation) in (Union, UnionType):
        if source.random() < 0.3 and type(None) in get_args(annotation):
            return None
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    if get_origin(annotation) is Literal:
        return source.choice(get_args(annotation))
    bounds = [m for m in field.metadata if isinstance(m, annotated_types.BaseMetadata)]
    low = max([float(getattr(m, "ge", getattr(m, "gt", 0))) for m in bounds], default=0.0)
    high = min([float(getattr(m, "le", getattr(m, "lt", 9))) for m in bounds], default=9.0)
    if annotation is bool:
        return source.random() < 0.5
    if annotation is int:
        return source.randint(int(low), int(min(high, low + 9)))
    if annotation is float:
        return round(low + (high - low) * source.uniform(0.01, 0.99), 4)
    if annotation is Length:
        return source.choice(["0 steps", "1 steps", "1 epochs"])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return draw_section(annotation, source, share=0.2)
    return None


def draw_section(kind: type[BaseModel], source: random.Random, share: float) -> dict[str, Any]:
    """Random values of a share of a section's fields; what has no value here keeps its default."""
    drawn = {
        name: draw(field, name, source)
        for name, field in kind.model_fields.items()
        if name != "name" and source.random() < share
    }
    return {name: value for name, value in drawn.items() if value is not None}


def settings(method: str, count: int) -> Iterator[dict[str, Any]]:
    source = random.Random(method)
    for number in range(count):
        values = draw_section(METHODS[method].Config, source, share=source.choice([0.2, 0.5]))
        small = {
            "name": method,
            "embedding_dim": source.choice([4, 6, 8, 12]),
            "classes_per_batch": source.randint(2, 5),
        }
        optimizer = {"lr": 1e-3, "name": source.choice(["adamw", "sgd", "adam"])}
        values |= {
            name: optimizer for name in METHODS[method].Config.model_fields if name.endswith("optimizer") and number % 2
        }
        yield {**values, **small}


def try_one(values: dict[str, Any], store: Store, root: Path) -> str:
    """ "refused" in one line, or "trained" a step."""
    changes = {
        "method": values, "length": "1 steps", "data.validation_fold": None, "evaluation.checkpoint": "last", "evaluation.test": False,
        "name": "drawn", "model.batch_norm": "frozen",
    }  # fmt: skip
    try:
        config = build_config(tiny_values(str(root), store.folder.uri, changes))
        check_run(config, store)
    except UserError as error:
        assert all(line.count(":") for line in str(error).splitlines()), error
        return "refused"
    try:
        make_worker(config, 0, (1,))()
    finally:
        shutil.rmtree(root / "runs", ignore_errors=True)
    return "trained"


def test_settings_that_are_accepted_make_a_step(store: Store, tmp_path: Path) -> None:
    run_all(EVERY_DAY, store, tmp_path)


@pytest.mark.slow
def test_thousands_of_settings(store: Store, tmp_path: Path) -> None:
    counts = run_all(SLOW, store, tmp_path)
    assert sum(counts.values()) >= 2000 and counts["trained"] > 600, counts


def run_all(count: int, store: Store, root: Path) -> dict[str, int]:
    counts = {"refused": 0, "trained": 0}
    failures = []
    for method in METHODS:
        for values in settings(method, count):
            try:
                counts[try_one(values, store, root)] += 1
            except Exception as error:  # every one of them is shown
                failures.append(f"{values}: {type(error).__name__}: {str(error)[:300]}")
    print(counts)
    assert not failures, "\n".join(failures)
    return counts
