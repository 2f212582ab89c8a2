"""Losses and miners of pytorch-metric-learning, or of a user's own, built from names and arguments.

    loss: ContrastiveLoss
    loss_args: {pos_margin: 0, neg_margin: 1, distance: {name: LpDistance, p: 2}, reducer: MeanReducer}

Distances, reducers and regularizers are named like losses, with their arguments beside the name. Instead of a name of the
library, an import string (`mypackage.losses:MyLoss`) names a class of the user's own.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from methods import plugins
from methods.base import MethodError
from methods.functional import global_generators, prefix

DERIVED_ARGUMENTS = {
    "num_classes",
    "embedding_size",
    "descriptors_dim",
}  # arguments that follow from the data and the head
# Arguments that are objects of the library: the kind of each.
PARTS = {
    "distance": "distance",
    "reducer": "reducer",
    "default_reducer": "reducer",
    "embedding_regularizer": "regularizer",
    "weight_regularizer": "regularizer",
}


def _subclasses(module: Any, base: type, excluded: tuple[str, ...] = ()) -> dict[str, type]:
    classes = {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base)}
    return {n: c for n, c in classes.items() if not n.startswith("Base") and n not in excluded}


@functools.cache
def loss_classes() -> Mapping[str, type]:
    """The losses by name, without wrappers around another loss and what is not a function of (embeddings, labels).

    The library is imported at the first call, here and below: it loads scipy, over 1 CPU-s, which other methods do not need.
    """
    from pytorch_metric_learning import losses

    return _subclasses(losses, losses.BaseMetricLossFunction, ("GenericPairLoss", "VICRegLoss", "ManifoldLoss"))


@functools.cache
def miner_classes() -> Mapping[str, type]:
    """The miners by name."""
    from pytorch_metric_learning import miners

    return _subclasses(miners, miners.BaseMiner, ("EmbeddingsAlreadyPackagedAsTriplets",))


@functools.cache
def part_classes(kind: str) -> Mapping[str, type]:
    """The distances, reducers or regularizers by name."""
    from pytorch_metric_learning import distances, reducers, regularizers

    if kind == "distance":
        return _subclasses(distances, distances.BaseDistance, ("BatchedDistance",))
    if kind == "reducer":
        return _subclasses(reducers, reducers.BaseReducer)
    return _subclasses(regularizers, regularizers.BaseRegularizer)


def build_loss(name: str, arguments: Mapping[str, Any], num_classes: int, dim: int) -> Any:
    """The loss, for so many classes and embeddings of `dim` dimensions.

    Raises:
        ValueError: One line: name or an argument is unknown, or the class does not accept them.
    """
    derived = {"num_classes": num_classes, "embedding_size": dim, "descriptors_dim": dim}
    return _build("loss", name, arguments, loss_classes(), derived)


def build_miner(name: str, arguments: Mapping[str, Any]) -> Any:
    """The miner.

    Raises:
        ValueError: As `build_loss`.
    """
    return _build("miner", name, arguments, miner_classes(), {})


def _build(
    key: str, name: str, arguments: Mapping[str, Any], classes: Mapping[str, type], derived: Mapping[str, int]
) -> Any:
    """Makes an object; every argument is checked against the signatures of the class and its bases."""
    cls = _lookup(key, name, classes)
    accepted = _accepted(cls)
    values = {n: v for n, v in derived.items() if n in accepted}
    for argument, value in arguments.items():
        place = f"{key}_args.{argument}" if key in ("loss", "miner") else f"{key}.{argument}"
        if argument in DERIVED_ARGUMENTS and value is not None:
            raise ValueError(f"{place} follows from the data and the head: leave it out (null: the class's default)")
        if argument not in accepted:
            hint = _hint(argument, accepted - DERIVED_ARGUMENTS)
            raise ValueError(f"{name} takes no argument {argument!r}{hint}")
        if argument in PARTS and value is not None:
            value = _part(place, value, PARTS[argument], derived)
        elif argument == "reducers" and isinstance(value, Mapping):
            value = {n: _part(f"{place}.{n}", spec, "reducer", derived) for n, spec in value.items()}
        values[argument] = value
    try:
        return cls(**values)
    except Exception as error:  # whatever a third party's constructor raises
        raise ValueError(f"{name} does not accept {dict(arguments)}: {first_line(error)}") from None


def _part(place: str, value: Any, kind: str, derived: Mapping[str, int]) -> Any:
    """A distance, reducer or regularizer from its name, or from a mapping of its name and its arguments."""
    spec = {"name": value} if isinstance(value, str) else value
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        example = {"distance": "{name: LpDistance, p: 2}", "reducer": "{name: ThresholdReducer, low: 0}"}
        raise ValueError(
            f"{place} is {value!r}, expected a name, or {example.get(kind, '{name: LpRegularizer, p: 2}')}"
        )
    arguments = {n: v for n, v in spec.items() if n != "name"}
    return _build(place, spec["name"], arguments, part_classes(kind), derived)


def _lookup(key: str, name: str, classes: Mapping[str, type]) -> type:
    if plugins.is_import_string(name):
        return plugins.load(name, key, nn.Module)
    if name == "CrossBatchMemory":
        raise ValueError(
            "CrossBatchMemory is no loss of its own: name the loss that it wraps, and set method.memory to the number of past "
            "embeddings"
        )
    if name not in classes:
        raise ValueError(f"{key} {name!r} is unknown{_hint(name, set(classes))}")
    return classes[name]


def _accepted(cls: type) -> set[str]:
    """Names of the arguments of a class's constructor and of those of its bases."""
    accepted: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base) and base is not nn.Module and base is not object:
            parameters = inspect.signature(base).parameters
            accepted |= {
                n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL
            }
    return accepted


def _hint(name: str, names: set[str]) -> str:
    close_matches = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f": did you mean {close_matches[0]!r}?" if close_matches else f", known: {sorted(names)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- calls -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class References:
    """Embeddings that a batch is compared with: its own, and others behind them; all of them constant.

    Attributes:
        embeddings: [R, D].
        labels: [R].
        rows: Number B of the first references, which are the batch itself: row i is never compared with reference i.
        negatives_only: The others are negatives only, and the batch's own rows positives only.
    """

    embeddings: Float[Tensor, "references dim"]
    labels: Int64[Tensor, " references"]
    rows: int
    negatives_only: bool

    @classmethod
    def of(
        cls, batch: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor, negatives_only: bool
    ) -> References:
        """The batch and others behind it."""
        embeddings = torch.cat([batch.detach(), others.to(batch, non_blocking=True)])
        return cls(embeddings, torch.cat([labels, other_labels]), len(batch), negatives_only)

    def prefix(self, dim: int) -> References:
        """With the first dimensions of each embedding, at length one."""
        return replace(self, embeddings=prefix(self.embeddings, dim))

    def pairs(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which references are positives and which are negatives of each row, bool [B, R]."""
        same = labels[:, None] == self.labels[None]
        positive, negative = same.clone(), ~same
        positive[:, : self.rows].fill_diagonal_(False)
        if self.negatives_only:
            positive[:, self.rows :] = False
            negative[:, : self.rows] = False
        return positive, negative

    def tuples(self, miner: Any, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Pairs (a1, p, a2, n) or triplets (a, p, n) for a loss of the library: all of them, or those that a miner has chosen."""
        positive, negative = self.pairs(labels)
        if miner is None:
            return (*positive.nonzero(as_tuple=True), *negative.nonzero(as_tuple=True))
        mined = miner(embeddings, labels, self.embeddings, self.labels)
        if len(mined) == 3:
            anchors, positives, negatives = mined
            kept = positive[anchors, positives] & negative[anchors, negatives]
            return anchors[kept], positives[kept], negatives[kept]
        first, positives, second, negatives = mined
        near, far = positive[first, positives], negative[second, negatives]
        return first[near], positives[near], second[far], negatives[far]


def evaluate_loss(
    loss: Any, miner: Any, embeddings: Tensor, labels: Tensor, references: References | None = None
) -> Tensor:
    """The loss of a batch, among itself or against references; a scalar.

    Raises:
        MethodError: Loss or miner raised an error; the line names it.
    """
    part = miner
    try:
        if references is None:
            tuples = miner(embeddings, labels) if miner is not None else None
            part = loss
            value = loss(embeddings, labels) if tuples is None else loss(embeddings, labels, tuples)
            return value if value.ndim == 0 else value.reshape(())
        tuples = references.tuples(miner, embeddings, labels)
        part = loss
        return loss(embeddings, labels, tuples, ref_emb=references.embeddings, ref_labels=references.labels).reshape(())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a third party's loss raises
        problem = plugins.failure(error) if plugins.is_own(type(part)) else first_line(error)
        raise MethodError(f"{type(part).__name__} failed on a batch of {len(labels)} embeddings: {problem}") from error


def check_references(make_loss: Callable[[], Any], miner: Any, dim: int) -> None:
    """Tries a loss with fewer and with more references than rows, and whether it keeps to the pairs that it is given.

    Args:
        make_loss: Makes the loss; a new one for each trial, since some keep statistics.
        miner: The miner, or None.
        dim: Dimension D of the embeddings.

    Raises:
        MethodError: It fails.
        ValueError: It compares other pairs than it is given: rows with themselves.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3])  # the last two have no positive
    batch, changed = torch.randn(2, 8, dim, generator=generator)
    changed = torch.cat([batch[:6], changed[6:]])
    for number in (4, 12):
        others, classes = torch.randn(number, dim, generator=generator), torch.arange(number) % 3 + 4
        values = []
        for own in (batch, changed):
            references = References(torch.cat([own, others]), torch.cat([labels, classes]), 8, True)
            with global_generators(0):
                values.append(float(evaluate_loss(make_loss(), None, batch, labels, references)))
        with global_generators(0):
            evaluate_loss(make_loss(), miner, batch, labels, replace(references, negatives_only=False))
        if not math.isclose(values[0], values[1], rel_tol=1e-5, abs_tol=1e-7):
            raise ValueError("it takes its pairs from the labels, and so would compare an image with itself")
