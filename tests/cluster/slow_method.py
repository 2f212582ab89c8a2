"""The baseline with a pause in each step, so that nodes can come and go while a small run lasts."""

from __future__ import annotations

import time

from methods import Batch
from methods.base import Context
from methods.baseline import Baseline, BaselineConfig


class SlowConfig(BaselineConfig):
    pause_s: float = 0.3


class Slow(Baseline):
    Config = SlowConfig

    def training_step(self, batch: Batch, context: Context) -> dict[str, float]:
        time.sleep(self.config.pause_s)
        return super().training_step(batch, context)
