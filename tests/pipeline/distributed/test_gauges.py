"""The gauges of a run, and that the Grafana dashboard and the documentation show gauges that exist."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.distributed import gauges
from pipeline.distributed.gauges import GAUGES, VALIDATION, RunGauges
from pipeline.distributed.run_status import RunStatusProxy

ROOT = Path(__file__).parents[3]
EXPORTED = {f"ray_{name}" for name, _ in [*GAUGES.values(), VALIDATION]}
AT = {"phase": "training", "step": 5, "total": 9, "epoch": 0.5, "images_per_second": 20.0, "waiting": 0.1, "loss": 0.25,
      "mining/lag": 3.0}  # fmt: skip


class Gauge:
    """In place of Ray's."""

    values: dict[tuple[str, str], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert re.fullmatch(r"raydml_[a-z_]+", name) and description
        self.name, self.tag_keys = name, tag_keys

    def set_default_tags(self, tags: dict[str, str]) -> None:
        assert set(tags) == {"run", "rank"} <= set(self.tag_keys)

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[self.name, (tags or {}).get("metric", "")] = value


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    monkeypatch.setattr(Gauge, "values", {}, raising=False)
    return Gauge.values


def test_what_is_set(values: dict[tuple[str, str], float], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(gauges.time, "monotonic", lambda: now[0])
    shown = RunGauges("photos")
    shown.set({"phase": "starting"})
    assert values == {}
    shown.set(AT)
    expected = {
        "step": 5,
        "epoch": 0.5,
        "images_per_second": 20.0,
        "waiting_share": 0.1,
        "loss": 0.25,
        "mining_lag": 3.0,
    }
    assert values == {(f"raydml_{name}", ""): value for name, value in expected.items()}
    shown.set(AT | {"step": 6})
    assert values["raydml_step", ""] == 5, "a second has not passed"
    now[0] += 1
    shown.set(AT | {"step": 7, "loss": float("nan"), "skipped_steps": 1.0})
    assert (values["raydml_step", ""], values["raydml_loss", ""], values["raydml_skipped_steps", ""]) == (7, 0.25, 1)
    shown.set_validation({"step": 7, "epoch": 0.5, "images": 60, "map@r": 31.5, "recall@1": 70.0})
    assert {key: v for key, v in values.items() if key[1]} == {
        ("raydml_validation_percent", "map@r"): 31.5,
        ("raydml_validation_percent", "recall@1"): 70.0,
    }


def test_a_worker_sets_them_where_it_publishes(values: dict[tuple[str, str], float]) -> None:
    class Actor:
        class publish:
            remote = staticmethod(lambda progress: None)

        class add_validation:
            remote = staticmethod(lambda point: None)

    status = RunStatusProxy(Actor())
    status.gauges = RunGauges("photos")
    status.publish(AT)
    status.add_validation({"step": 5, "map@r": 31.5})
    assert values["raydml_loss", ""] == 0.25 and values["raydml_validation_percent", "map@r"] == 31.5
    started = time.perf_counter()
    for _ in range(1000):
        status.publish(AT)
    assert (time.perf_counter() - started) / 1000 < 1e-4, "a step pays for a comparison of times"


def test_the_dashboard_shows_gauges_that_exist() -> None:
    text = (ROOT / "cluster" / "grafana" / "raydml.json").read_text()
    board: dict[str, Any] = json.loads(text)
    assert set(re.findall(r"ray_raydml_\w+", text)) == EXPORTED, "all of them, and no other"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) and all(panel["targets"] for panel in panels)
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    assert all('run=~"$run"' in expression for expression in expressions)
    names = {variable["name"] for variable in board["templating"]["list"]}
    assert (
        set(re.findall(r"\$\{?(\w+)\}?", "\n".join([*expressions, *(p["datasource"]["uid"] for p in panels)]))) <= names
    )
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}
    assert len(places) == len(panels)


def test_the_documentation_names_gauges_that_exist() -> None:
    text = (ROOT / "docs" / "guides" / "watching.md").read_text()
    named = set(re.findall(r"`(ray_raydml_\w+)`", text)) | {
        f"ray_raydml_mining{s}" for s in re.findall(r"`(_\w+)`", text)
    }
    assert named == EXPORTED
