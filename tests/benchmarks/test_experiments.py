"""The experiments on the methods: every setting is accepted, records are kept, tables are made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import experiments
from benchmarks.controls import ShuffledMmsi
from methods import METHODS
from methods.mmsi import Mmsi, MmsiConfig
from methods.mmsi_weights import select_pairs
from pipeline.config import Config
from pipeline.recipes import load_config

ROWS = list(experiments.experiments())
STUDIED = set(METHODS) - {"baseline"}


def configs(row: experiments.Experiment, folder: Path) -> list[Config]:
    """The method's and its base's."""
    recipe, sides = folder / "recipe.yaml", []
    for settings in row.sides:
        recipe.write_text(yaml.safe_dump({"preset": experiments.preset(row.method), **settings}))
        sides.append(load_config(str(recipe)))
    return sides


def test_every_experiment_is_a_recipe_that_is_accepted(tmp_path: Path) -> None:
    assert {row.method for row in ROWS} == STUDIED
    for row in ROWS:
        ours, base = sides = configs(row, tmp_path)
        assert ours.method != base.method, row.title
        assert all(config.data.validation_fold == 0 and not config.evaluation.test for config in sides)
        assert all(config.evaluation.every.value <= config.length.value for config in sides), row.title
        if row.title == experiments.AS_IT_IS:
            assert ours.model == base.model and ours.data == base.data and ours.length == base.length


def test_a_row_changes_what_it_says_alone(tmp_path: Path) -> None:
    """Also where it names a control instead of the method, which a recipe would start from nothing."""
    presets = {row.method: row for row in ROWS if row.title == experiments.AS_IT_IS}
    changes = {
        (method, title): change
        for method, entry in yaml.safe_load(experiments.EXPERIMENTS.read_text())["methods"].items()
        for title, change in entry["own"].items()
    }

    for row in ROWS:
        if (row.method, row.title) in changes:
            before, after = (configs(r, tmp_path)[0].method.model_dump() for r in (presets[row.method], row))
            differ = {key for key in before | after if before.get(key) != after.get(key)}
            assert differ == set(changes[row.method, row.title]["method"]), row.title
            assert row.sides[1] == presets[row.method].sides[1], "the base is unchanged"


def test_a_step_of_mmsi_has_as_many_images_as_one_of_its_base(tmp_path: Path) -> None:
    for row in ROWS:
        if row.method != "mmsi":
            continue
        images = []
        for config in configs(row, tmp_path):
            of_method = config.method
            meta = of_method.meta_classes if of_method.meta else 0
            images.append(of_method.classes_per_batch * of_method.samples_per_class + meta)
        assert images[0] == images[1], row.title


def test_pages_have_the_tables_of_the_kept_records() -> None:
    methods = [folder.name for folder in experiments.RESULTS.iterdir()]
    assert methods
    for method in methods:
        table = experiments.experiments_table(
            method, [row for row in ROWS if row.method == method], 2, experiments.RESULTS
        )
        assert table in (experiments.ROOT / "docs" / "methods" / f"{method}.md").read_text(), "write them: --write"


def test_records_are_kept_shared_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row in ROWS if row.method == "osm_caa" and row.title in (experiments.AS_IT_IS, "attention alone")]
    asked: list[tuple[bool, bool, int]] = []

    def run(method: str, settings: Mapping[str, Any], seed: int) -> dict[str, float]:
        of_method = settings.get("method", {})
        soft, attention = of_method.get("osm", True), of_method.get("caa", True)
        asked.append((soft, attention, seed))
        if (soft, attention, seed) == (True, True, 1):
            raise RuntimeError("error: no memory")
        return {
            "recall@1": 50.0 + 8 * soft + 2 * attention + seed,
            "map@r": 30.0 + attention,
            "seconds": 1.0 + soft,
            "gradient": 2.0 - soft,
        }

    failed = experiments.train_missing(rows, 2, tmp_path, 1, None, run)
    assert failed == ["osm_caa, the preset: error: no memory"]
    assert len(asked) == 6 and sorted(asked)[0] == (False, False, 0), "both rows have the same base"
    assert [seed for *_, seed in asked] == [0, 0, 0, 1, 1, 1]
    record = json.loads(next((tmp_path / "osm_caa").glob("*-0.json")).read_text())
    assert record["settings"]["data"]["validation_fold"] == 0 and record["seed"] == 0
    assert experiments.train_missing(rows, 2, tmp_path, 1, 0.0, run) == [] and len(asked) == 6, "no time is left"
    assert len(experiments.train_missing(rows, 2, tmp_path, 1, None, run)) == 1 and len(asked) == 7, (
        "only what is missing"
    )
    text = experiments.experiments_table("osm_caa", rows, 2, tmp_path)
    assert "| the preset | 60.0 | 31.0 | 50.0 | 30.0 | +10.0 | +1.0 | 0.50 | 2.00 | 1 |" in text
    assert "| attention alone | 52.5 | 31.0 | 50.5 | 30.0 | +2.0 | +1.0 | 1.00 | 1.00 | 2 |" in text
    said = capsys.readouterr().err
    assert "osm_caa, attention alone, seed 1: 53.0" in said
    assert "osm_caa, its base, the preset, seed 0: 50.0" in said, "a run of several rows has the name of the first"


def test_figures_of_a_run_with_steps_that_train_nothing(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "kind": "train"},  # no gradient: MMSI's before its memory is full
        {"step": 10, "kind": "train", "gradient/main": 2.0},
        {"step": 20, "kind": "train", "gradient/main": 3.0},
        {"step": 10, "kind": "validation", "recall@1": 40.0, "map@r": 20.0},
        {"step": 20, "kind": "validation", "recall@1": 50.0, "map@r": 30.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "summary.json").write_text(json.dumps({"seconds": 12.5}))
    figures = {"recall@1": 50.0, "map@r": 30.0, "seconds": 12.5, "gradient": 2.5}
    assert experiments.figures_of_run(tmp_path) == figures


def test_weights_exchanged_at_random_are_as_large_and_at_other_pairs() -> None:
    config = ShuffledMmsi.Config(loss="multi_similarity", embedding_dim=6)
    ours, control = Mmsi(MmsiConfig(loss="multi_similarity", embedding_dim=6), 8, 4), ShuffledMmsi(config, 8, 4)
    random = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(16, 6, generator=random), dim=1)
    chosen = select_pairs(embeddings @ embeddings.T, torch.arange(16) // 4, config)
    u = torch.where(chosen.slots, torch.randn(16, 16, generator=random), 0)
    weights, exchanged = ours.pair_weights(u, chosen), control.pair_weights(u, chosen)
    assert not torch.equal(weights, exchanged) and bool((exchanged[~chosen.slots] == 0).all())
    for mask in chosen[:2]:
        assert torch.equal(weights[mask].sort().values, exchanged[mask].sort().values)
