"""What one key of a search space may be: numbers of a range, one of several values, or a constant.

Optuna is imported at the first draw only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

RANGES = ("uniform", "log_uniform", "int", "log_int")
DISTRIBUTIONS = (*RANGES, "choice")
SCALARS = (str, bool, int, float, type(None))  # values that Optuna stores as they are


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        name: Name of the value in Optuna's studies.
        kind: One of RANGES.
        low, high: The ends.
        step: Distance of neighbouring values, from `low` on; None: any value (of an int: any whole number).
    """

    name: str
    kind: str
    low: int | float
    high: int | float
    step: int | float | None = None

    @property
    def is_int(self) -> bool:
        return self.kind in ("int", "log_int")

    @property
    def num_values(self) -> int | None:
        """How many values there are; None if they are continuous."""
        step = self.step or (1 if self.is_int else None)
        return None if step is None else round((self.high - self.low) / step) + 1

    def values(self) -> list[int | float]:
        """All values, which have to be countable."""
        count, step = self.num_values, self.step or 1
        assert count is not None
        values = [self.low + i * step for i in range(count)]
        return values if self.is_int else [min(float(f"{value:.12g}"), self.high) for value in values]

    def contains(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.is_int else (int, float)):
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        return self.low <= value <= self.high and abs(steps - round(steps)) < 1e-8

    def draw(self, trial: Trial) -> Any:
        log = self.kind.startswith("log")
        if self.is_int:
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step or 1), log=log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=log)

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        log = self.kind.startswith("log")
        if self.is_int:
            return IntDistribution(int(self.low), int(self.high), log=log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=log, step=self.step)

    def to_optuna(self, value: Any) -> Any:
        return value if self.is_int else float(value)

    def __str__(self) -> str:
        step = f" in steps of {self.step:g}" if self.step else ""
        return f"{self.kind} from {self.low:g} to {self.high:g}{step}"


@dataclass(frozen=True)
class Choice:
    """Some values, each with the keys that exist only with it.

    Attributes:
        name: Name of the value in Optuna's studies.
        options: The values.
        branches: Keys of each value; empty for most.
    """

    name: str
    options: tuple[Any, ...]
    branches: tuple[Items, ...]

    def index(self, value: Any) -> int | None:
        """Place of a value among the options; None if it is none of them. 1 and true differ."""
        return next((i for i, option in enumerate(self.options) if text_of(option) == text_of(value)), None)

    def draw(self, trial: Trial) -> Any:
        texts = [optuna_value(option) for option in self.options]
        return self.options[texts.index(trial.suggest_categorical(self.name, texts))]

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([optuna_value(option) for option in self.options])

    def __str__(self) -> str:
        return f"one of {', '.join(text_of(option) for option in self.options)}"


@dataclass(frozen=True)
class Constant:
    """A value that is the same in every trial."""

    value: Any


Items = Mapping[str, "Range | Choice | Constant"]


def is_number(value: Any, is_int: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if is_int else (int, float)):
        return False
    return math.isfinite(value)


def text_of(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def optuna_value(value: Any) -> Any:
    return value if isinstance(value, SCALARS) else text_of(value)
