"""Common parts of all configurations: the base class of the sections, and lengths of training in steps or epochs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator


class BaseConfig(BaseModel):
    """Base of every config: immutable; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Clock:
    """Progress of a run: `step` steps, or `epoch` (fractional) epochs, are done."""

    step: int = 0
    epoch: float = 0.0

    def elapsed(self, unit: str) -> float:
        return float(self.step) if unit == "steps" else self.epoch


class Length(BaseConfig):
    """A length of training, "200 steps" or "3 epochs"."""

    value: Annotated[float, Field(ge=0)]
    unit: Literal["steps", "epochs"]

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, (dict, Length)):
            return value
        words = str(value).split()
        if len(words) != 2 or words[1] not in ("step", "steps", "epoch", "epochs"):
            raise ValueError(f"got {value!r}, expected a length with its unit such as '200 steps' or '3 epochs'")
        try:
            number = float(words[0])
        except ValueError:
            raise ValueError(f"got {value!r}: {words[0]!r} is not a number") from None
        return {"value": number, "unit": words[1].rstrip("s") + "s"}

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
