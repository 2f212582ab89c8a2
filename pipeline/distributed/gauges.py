"""A run's figures as metrics of Ray, which Prometheus collects from every node; cluster/grafana/raydml.json shows them.

Set on rank 0, once a second at most: 40 µs. Ray adds the prefix `ray_` to the names. Where Ray does not run, there are none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

EVERY_S = 1.0
TAGS = ("run", "rank")

# Key of a run's progress: name of the gauge, what it shows.
GAUGES = {
    "step": ("raydml_step", "training steps done"),
    "epoch": ("raydml_epoch", "epochs done"),
    "images_per_second": ("raydml_images_per_second", "images trained on a second, mean of the run"),
    "waiting": ("raydml_waiting_share", "share of the training time spent waiting for images, 0 to 1"),
    "loss": ("raydml_loss", "loss of the newest step"),
    "skipped_steps": ("raydml_skipped_steps", "steps left out because they were not finite"),
    "mining/lag": ("raydml_mining_lag", "updates that the newest search of the mining server did not reflect"),
    "mining/recoveries": (
        "raydml_mining_recoveries",
        "how often mining servers were restored in this start of the workers",
    ),
    "mining/generation": ("raydml_mining_generation", "number of the index behind the newest search"),
    "mining/recall": ("raydml_mining_recall", "recall of the index behind the newest search, 0 to 1"),
}
VALIDATION = ("raydml_validation_percent", "metrics of the newest validation, in percent; the tag metric names them")


class RunGauges:
    """The gauges of one run, in the process that holds them.

    Args:
        run: Name of the run.
        rank: This worker's rank.
    """

    def __init__(self, run: str, rank: int = 0) -> None:
        from ray.util.metrics import Gauge

        tags = {"run": run, "rank": str(rank)}
        self._gauges = {key: Gauge(name, description, tag_keys=TAGS) for key, (name, description) in GAUGES.items()}
        self._validation = Gauge(*VALIDATION, tag_keys=(*TAGS, "metric"))
        for gauge in (*self._gauges.values(), self._validation):
            gauge.set_default_tags(tags)
        self._set_at = -math.inf

    def set(self, progress: Mapping[str, Any]) -> None:
        """Sets what a run's progress contains, unless it was done less than a second ago; a loss of NaN is left out."""
        now = time.monotonic()
        if now - self._set_at < EVERY_S or "step" not in progress:
            return
        self._set_at = now
        for key, gauge in self._gauges.items():
            value = progress.get(key)
            if value is not None and math.isfinite(value):
                gauge.set(value)

    def set_validation(self, point: Mapping[str, Any]) -> None:
        """Sets the metrics of a validation."""
        for name, value in point.items():
            if name not in ("step", "epoch", "images") and math.isfinite(value):
                self._validation.set(value, tags={"metric": name})
