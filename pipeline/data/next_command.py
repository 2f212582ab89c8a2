"""The command that trains on own photographs, printed when they have been prepared."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

import numpy as np
import yaml

from pipeline.data.store import Store
from pipeline.storage import Folder

CLASSES = 20  # of a batch of the preset baseline/photos
IMAGES_SEEN, LEAST_EPOCHS, MOST_EPOCHS = 24_000, 4, 20
# A smaller fold says little of a checkpoint (of two classes of birds every answer was right at each validation), and its classes are missed
# in training. The number is a judgement, not a measurement.
LEAST_FOLD_CLASSES = 4


def next_command(store: Store, roots: Sequence[str]) -> str | None:
    """The command that trains on own photographs, by the preset that needs no tuning; None where it would have nothing to train or test.

    What depends on the set is filled in: classes in a batch, where there are few, and the number of epochs, of about
    `IMAGES_SEEN` images together. A set whose fold would have fewer than `LEAST_FOLD_CLASSES` classes is trained on as a whole.

    Args:
        store: The dataset.
        roots: Storage roots whose datasets are found by their names.
    """
    in_fold = store.fold == 0
    of_training = (store.split == "train") & (store.label >= 0)
    choice: list[str] = []
    if _num_pairs(store.label[of_training & in_fold]) >= LEAST_FOLD_CLASSES:
        of_training &= ~in_fold
    else:
        choice = ["data.validation_fold=null", "evaluation.checkpoint=last"]
    trained = _num_pairs(store.label[of_training])
    tested = store.label[(store.split == "test") & (store.label >= 0)]
    if trained < 2 or (len(tested) and (_num_pairs(tested) == 0 or len(np.unique(tested)) == 1)):
        return None
    name = store.folder.uri.rsplit("/", 1)[1]
    source = name if any((Folder(root) / "data" / name).uri == store.folder.uri for root in roots) else store.folder.uri
    run = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "photos"  # what a run may be called
    settings = [f"name={_as_yaml(run)}", f"data.source={_as_yaml(source)}", *choice]
    if store.protocol == "reid":
        settings.append("evaluation.metric=map")
    if trained < CLASSES:
        settings.append(f"method.classes_per_batch={trained}")
    epochs = min(max(round(IMAGES_SEEN / of_training.sum()), LEAST_EPOCHS), MOST_EPOCHS)
    settings.append(f"length={epochs} epochs")
    words = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
    return f"next: python -m pipeline.train baseline/photos {words}"


def _num_pairs(labels: np.ndarray) -> int:
    """Number of classes of two images or more: a single one has nothing to be near to."""
    return int((np.bincount(labels) > 1).sum()) if len(labels) else 0


def _as_yaml(text: str) -> str:
    """A value of `--set` that is read as this text."""
    plain = re.fullmatch(r"[A-Za-z_/~][A-Za-z0-9_./~-]*", text) is not None and yaml.safe_load(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)
