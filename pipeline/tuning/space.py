"""Search spaces: the keys of a recipe that a sweep searches, with the distribution of each.

    method.optimizer.lr: {log_uniform: [1.0e-5, 1.0e-3]}
    method.embedding_dim: [64, 128]                          a plain list is a choice
    method.loss:
      choice:                                                keys below a value exist only with that value
        ContrastiveLoss: {method.loss_args.neg_margin: {uniform: [0.2, 0.8]}}
        ArcFaceLoss: {method.loss_args.margin: {uniform: [10, 40], step: 5}}

Anything else is a constant. Optuna is imported at the first draw only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError, close_names, did_you_mean
from pipeline.tuning.distributions import (
    DISTRIBUTIONS,
    Choice,
    Constant,
    Items,
    Range,
    is_number,
    optuna_value,
    text_of,
)

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution


class Space:
    """The search space of one method.

    Args:
        spec: Distribution, plain list or constant by key; keys dotted or nested.
        where: Its place in the sweep's file, for messages.

    Raises:
        UserError: One line: a distribution is misspelt or has ends that it cannot have, or a key stands twice.
    """

    def __init__(self, spec: Mapping[str, Any], where: str = "space") -> None:
        self.where = where
        items = _parse(flat_space(spec, where), where)
        _check_keys(items, where, frozenset())
        keys = [key for key, _ in _walk(items)]
        self.items = _named(items, {key for key in keys if keys.count(key) > 1}, "")

    @property
    def keys(self) -> list[str]:
        """The keys that are searched, those of branches too; without constants."""
        return list(dict.fromkeys(key for key, item in _walk(self.items) if not isinstance(item, Constant)))

    @property
    def all_keys(self) -> list[str]:
        """The keys that are searched, and the constants."""
        return list(dict.fromkeys(key for key, _ in _walk(self.items)))

    def draw(self, trial: Trial) -> dict[str, Any]:
        """Draws a setting by an Optuna trial: value by dotted key, constants and the keys of chosen branches included."""
        return _draw(self.items, trial)

    def distributions(self, values: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        """Optuna's distributions of the keys that are active in a setting, by name in the study."""
        return {item.name: item.distribution() for item, _ in self._active(values)}

    def params(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the active keys as Optuna stores them, by name in the study.

        A value that is not None, bool, int, float or str becomes its JSON text.
        """
        return {
            item.name: item.to_optuna(value) if isinstance(item, Range) else optuna_value(value)
            for item, value in self._active(values)
        }

    def names(self, values: Mapping[str, Any]) -> dict[str, str]:
        """The dotted key of each name in the study; they differ where branches give one key different distributions."""
        return {item.name: key for key, item in _active(self.items, values) if not isinstance(item, Constant)}

    def _active(self, values: Mapping[str, Any]) -> Iterator[tuple[Range | Choice, Any]]:
        for key, item in _active(self.items, values):
            if not isinstance(item, Constant):
                yield item, values[key]

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination, the last key changing fastest.

        Raises:
            UserError: A key is continuous: it has no step.
        """
        return _grid(self.items, self.where)

    def size(self) -> int | None:
        """Number of combinations; None if a key is continuous."""
        return _size(self.items)

    def corners(self) -> list[dict[str, Any]]:
        """Few settings that together have both ends of every range, and every option of every choice."""
        return _corners(self.items)

    def check_point(self, values: Mapping[str, Any], where: str = "point") -> dict[str, Any]:
        """Checks a given setting; returns it with dotted keys and with the space's constants.

        Raises:
            UserError: One line: a key is unknown, missing or inactive, or a value lies outside of its distribution.
        """
        known = self.all_keys
        given = _flat_point(values, known)
        out: dict[str, Any] = {}
        for key, item in _active(self.items, given):
            if isinstance(item, Constant):
                out[key] = given.get(key, item.value)
                if text_of(out[key]) != text_of(item.value):
                    raise UserError(f"{where}: {key} is {out[key]!r}, but the space has the constant {item.value!r}")
                continue
            if key not in given:
                raise UserError(f"{where} has no {key}: a point has a value for every key of the space ({item})")
            out[key] = given[key]
            if item.index(given[key]) is None if isinstance(item, Choice) else not item.contains(given[key]):
                raise UserError(f"{where}: {key} is {given[key]!r}, outside of the space: {item}")
        for key in given:
            if key not in out:
                hint = "it belongs to another option of a choice" if key in known else did_you_mean(key, known)
                raise UserError(f"{where}: {key} is no key of the space here: {hint}")
        return out


def flat_space(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A space with dotted keys: sections of the recipe may also be written as nested mappings.

    Raises:
        UserError: A distribution is misspelt, or a key stands twice.
    """
    out: dict[str, Any] = {}
    for key, value in spec.items():
        if not isinstance(key, str) or not key or "" in key.split("."):
            raise UserError(f"{where}: got the key {key!r}, expected a key of the recipe such as method.optimizer.lr")
        is_section = isinstance(value, Mapping) and value and not any(name in value for name in DISTRIBUTIONS)
        if is_section:
            _check_spelling(value, f"{where}: {key}")
        inner = {f"{key}.{k}": v for k, v in value.items()} if is_section else None
        for name, entry in ({key: value} if inner is None else flat_space(inner, where)).items():
            if name in out:
                raise UserError(f"{where}: {name} stands twice, once dotted and once nested: keep one")
            out[name] = entry
    return out


def _check_spelling(section: Mapping[str, Any], where: str) -> None:
    """A mapping that is meant to be a distribution but names none."""
    for name, value in section.items():
        similar = close_names(str(name), DISTRIBUTIONS)
        if similar and isinstance(value, (list, Mapping)):
            raise UserError(f"{where}: {name!r} is no distribution: did you mean {similar[0]!r}?")


def _parse(spec: Mapping[str, Any], where: str) -> Items:
    return {key: _item(key, value, f"{where}: {key}") for key, value in spec.items()}


def _item(name: str, value: Any, where: str) -> Range | Choice | Constant:
    if isinstance(value, list):
        return _choice(name, value, where)
    if not isinstance(value, Mapping) or not value:
        return Constant(value)
    kinds = [kind for kind in DISTRIBUTIONS if kind in value]
    further = [str(k) for k in value if k not in (*kinds, "step")]
    if len(kinds) != 1 or further:
        got = ", ".join([*kinds[1:], *further])
        raise UserError(f"{where}: got {got} beside {kinds[0]}, expected one distribution, and step at most")
    kind = kinds[0]
    if kind == "choice":
        if "step" in value:
            raise UserError(f"{where}: a choice has no step")
        return _choice(name, value[kind], where)
    return _range(name, kind, value[kind], value.get("step"), where)


def _range(name: str, kind: str, ends: Any, step: Any, where: str) -> Range:
    is_int, is_log = kind in ("int", "log_int"), kind.startswith("log")
    number = "whole number" if is_int else "number"
    if not isinstance(ends, list) or len(ends) != 2 or not all(is_number(end, is_int) for end in ends):
        raise UserError(f"{where}: got {kind} {ends!r}, expected two {number}s, [low, high]")
    low, high = ends
    if low >= high:
        raise UserError(f"{where}: got {kind} {ends!r}, expected the smaller number first (one value is a constant)")
    if is_log and low <= 0:
        raise UserError(f"{where}: got {kind} {ends!r}, expected numbers above 0 for a logarithm")
    if step is not None:
        if is_log:
            raise UserError(f"{where}: {kind} has no step; list the values in a choice instead")
        if not is_number(step, is_int) or step <= 0 or step > high - low:
            raise UserError(
                f"{where}: got step {step!r}, expected a {number} above 0, at most high - low = {high - low:g}"
            )
        rest = (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step))
        if rest:
            raise UserError(
                f"{where}: no whole number of steps of {step:g} leads from {low:g} to {high:g}: "
                f"end at {Decimal(str(high)) - rest}, or change the step"
            )
    return (
        Range(name, kind, low, high, step)
        if is_int
        else Range(name, kind, float(low), float(high), step and float(step))
    )


def _choice(name: str, given: Any, where: str) -> Choice:
    branches: list[Items]
    if isinstance(given, Mapping):
        options, branches = list(given), []
        for option, below in given.items():
            if below is not None and not isinstance(below, Mapping):
                raise UserError(f"{where}: below the option {option!r} got {below!r}, expected keys, or {{}}")
            inside = f"{where} = {option}"
            branches.append(_parse(flat_space(below or {}, inside), inside))
    elif isinstance(given, list):
        options, branches = given, [{}] * len(given)
    else:
        raise UserError(f"{where}: got choice {given!r}, expected a list of values")
    if not options:
        raise UserError(f"{where}: the choice is empty, expected at least one value")
    for i, option in enumerate(options):
        if isinstance(option, float) and not math.isfinite(option):
            raise UserError(f"{where}: got the value {option}, expected finite numbers")
        if optuna_value(option) in [optuna_value(earlier) for earlier in options[:i]]:
            raise UserError(f"{where}: the value {option!r} stands twice (1 and true count as the same)")
    return Choice(name, tuple(options), tuple(branches))


def _named(items: Items, repeated: set[str], branch: str) -> Items:
    """The items with their names in a study: the key, and the branch too where a key stands in several."""
    out: dict[str, Range | Choice | Constant] = {}
    for key, item in items.items():
        name = f"{key}{branch}" if key in repeated else key
        if isinstance(item, Range):
            out[key] = replace(item, name=name)
        elif isinstance(item, Choice):
            below = [
                _named(inner, repeated, f" [{key} = {option}]")
                for option, inner in zip(item.options, item.branches, strict=True)
            ]
            out[key] = replace(item, name=name, branches=tuple(below))
        else:
            out[key] = item
    return out


def _check_keys(items: Items, where: str, outside: frozenset[str]) -> None:
    """Keys may only meet in different branches of one choice."""
    here = outside | set(items)
    for key in items:
        above = [".".join(key.split(".")[:n]) for n in range(1, key.count(".") + 1)]
        clash = next((other for other in above if other in here), None) or (key if key in outside else None)
        if clash:
            raise UserError(f"{where}: {key} and {clash} cannot be active at once: keep one of them")
    for key, item in items.items():
        if not isinstance(item, Choice):
            continue
        others = {k for other, i in items.items() if other != key and isinstance(i, Choice) for k, _ in _walk_below(i)}
        for option, branch in zip(item.options, item.branches, strict=True):
            _check_keys(branch, f"{where}: {key} = {option}", frozenset(here | others))


def _walk(items: Items) -> Iterator[tuple[str, Range | Choice | Constant]]:
    """All keys, those of all branches too."""
    for key, item in items.items():
        yield key, item
        if isinstance(item, Choice):
            yield from _walk_below(item)


def _walk_below(choice: Choice) -> Iterator[tuple[str, Range | Choice | Constant]]:
    for branch in choice.branches:
        yield from _walk(branch)


def _active(items: Items, values: Mapping[str, Any]) -> Iterator[tuple[str, Range | Choice | Constant]]:
    """The keys that exist in a setting; a choice without a valid value has no branch."""
    for key, item in items.items():
        yield key, item
        if isinstance(item, Choice) and key in values:
            index = item.index(values[key])
            if index is not None:
                yield from _active(item.branches[index], values)


def _draw(items: Items, trial: Trial) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in items.items():
        out[key] = item.value if isinstance(item, Constant) else item.draw(trial)
        if isinstance(item, Choice):
            index = item.index(out[key])
            assert index is not None
            out |= _draw(item.branches[index], trial)
    return out


def _grid(items: Items, where: str) -> Iterator[dict[str, Any]]:
    columns: list[list[dict[str, Any]]] = []
    for key, item in items.items():
        if isinstance(item, Constant):
            columns.append([{key: item.value}])
        elif isinstance(item, Choice):
            columns.append(
                [
                    {key: option} | below
                    for option, branch in zip(item.options, item.branches, strict=True)
                    for below in _grid(branch, where)
                ]
            )
        elif item.num_values is None:
            raise UserError(
                f"{where}: {key} is continuous ({item}), a grid needs steps: add `step`, or list the values"
            )
        else:
            columns.append([{key: value} for value in item.values()])
    for combination in itertools.product(*columns):
        yield {key: value for part in combination for key, value in part.items()}


def _size(items: Items) -> int | None:
    size = 1
    for item in items.values():
        if isinstance(item, Constant):
            continue
        if isinstance(item, Choice):
            below = [_size(branch) for branch in item.branches]
            count = None if None in below else sum(n for n in below if n is not None)
        else:
            count = item.num_values
        if count is None:
            return None
        size *= count
    return size


def _corners(items: Items) -> list[dict[str, Any]]:
    columns: list[list[dict[str, Any]]] = []
    for key, item in items.items():
        if isinstance(item, Constant):
            columns.append([{key: item.value}])
        elif isinstance(item, Range):
            columns.append([{key: item.low}, {key: item.high}])
        else:
            columns.append(
                [
                    {key: option} | corner
                    for option, branch in zip(item.options, item.branches, strict=True)
                    for corner in _corners(branch)
                ]
            )
    num_corners = max((len(column) for column in columns), default=1)
    return [
        {key: value for column in columns for key, value in column[i % len(column)].items()} for i in range(num_corners)
    ]


def _flat_point(values: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    """A point with dotted keys; a mapping is a value where the space has its key, else a section of the recipe."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known and isinstance(value, Mapping):
            out |= _flat_point({f"{key}.{k}": v for k, v in value.items()}, known)
        else:
            out[str(key)] = value
    return out
