"""Common parts of all configurations: the base class of the sections, and lengths of training in steps or epochs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator


class BaseConfig(BaseModel):
    """Base of every config: immutable; an unknown key is an error, and so is a number that is not finite.

    Accepted are also: a key's options in other letters ("AdamW"), "none" for null, a single value or "1, 5, 10" where a
    list is expected, and a number where text is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    @model_validator(mode="before")
    @classmethod
    def _accept_spellings(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields
        return {k: _as_written(v, fields[k].annotation) if k in fields else v for k, v in values.items()}


def _as_written(value: Any, annotation: Any) -> Any:
    """A value in the form that the annotation expects, if it differs in its spelling only."""
    types = (annotation, *get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if isinstance(value, str):
        options = [option for t in types if get_origin(t) is Literal for option in get_args(t)]
        if value in options:
            return value
        text = value.strip().lower()
        if type(None) in types and text in ("none", "null"):
            return None
        value = next((option for option in options if isinstance(option, str) and option.lower() == text), value)
    is_list = any(get_origin(t) is tuple and get_args(t)[1:] == (...,) for t in types)
    if is_list and isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if is_list and isinstance(value, (int, float)) else value


@dataclass(frozen=True)
class Clock:
    """Progress of a run: `step` steps, or `epoch` (fractional) epochs, are done."""

    step: int = 0
    epoch: float = 0.0

    def elapsed(self, unit: str) -> float:
        return float(self.step) if unit == "steps" else self.epoch


_LENGTH = re.compile(r"(?P<number>\S*?)\s*(?P<unit>step|epoch)s?")


class Length(BaseConfig):
    """A length of training, "200 steps" or "3 epochs"."""

    value: Annotated[float, Field(ge=0)]
    unit: Literal["steps", "epochs"]

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, (dict, Length)):
            return value
        match = _LENGTH.fullmatch(str(value).strip().lower())
        if match is None:
            raise ValueError(f"got {value!r}, expected a length with its unit such as '200 steps' or '3 epochs'")
        try:
            number = float(match["number"])
        except ValueError:
            raise ValueError(f"got {value!r}: {match['number']!r} is not a number") from None
        return {"value": number, "unit": match["unit"] + "s"}

    @model_serializer
    def __str__(self) -> str:
        number = int(self.value) if self.value.is_integer() else self.value  # all digits: it has to read back equal
        return f"{number} {self.unit}"

    def fraction_done(self, clock: Clock) -> float:
        """Fraction of this length that has passed, from 0 to 1 (1 for an empty length)."""
        fraction = clock.elapsed(self.unit) / self.value if self.value else 1.0
        return 1.0 if fraction > 1 - 1e-9 else fraction

    def steps(self, steps_per_epoch: int) -> int:
        """The length in steps, at least 1, for an epoch of `steps_per_epoch` steps."""
        return max(1, round(self.value * (steps_per_epoch if self.unit == "epochs" else 1)))
