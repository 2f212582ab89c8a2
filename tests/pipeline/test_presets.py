"""Every preset is valid, complete, and says what its paper's table says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from methods import METHODS
from methods.plans import class_balanced
from pipeline.config import Config
from pipeline.model.trunk import build_trunk
from pipeline.recipes import load_config, preset_names, recipe_values

PHOTOS = ("baseline/photos", "baseline/photos_vit")
PAPERS = [name for name in preset_names() if not name.endswith("/emoji") and name not in PHOTOS]


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_leave_nothing_of_the_method_to_defaults(name: str) -> None:
    config = load_config(name)
    assert config.method.name == name.split("/")[0]
    written = recipe_values(name)
    shape = (
        {"triplets_per_batch"} if config.method.name == "smart_mining" else {"classes_per_batch", "samples_per_class"}
    )
    assert shape | {"embedding_dim", "optimizer"} <= set(written["method"])
    assert config.name.startswith(name.split("/")[0]) or name.endswith("/emoji") or name in PHOTOS


def test_there_is_one_for_each_paper_dataset_and_backbone_and_for_emoji() -> None:
    gca = {f"gca_hng/{d}_{b}" for d in ("cub", "cars", "sop", "inshop") for b in ("resnet50", "googlenet", "dino")}
    intra = {f"intra_batch/{d}_resnet50" for d in ("cub", "cars", "sop", "inshop")} | {
        "intra_batch/sop_resnet50_released"
    }
    osm = {f"osm_caa/{d}_bninception{mode}" for d in ("cub", "cars", "mars", "lpw") for mode in ("", "_caffe")}
    mmsi = {f"mmsi/{d}_bninception" for d in ("cub", "cars", "sop")}
    mmsi |= {f"mmsi/{d}_bninception_contrastive" for d in ("cub", "cars")}
    smart = {f"smart_mining/{d}_googlenet{profile}" for d in ("cub", "cars") for profile in ("", "_modern")}
    baseline = {f"baseline/{d}_bninception" for d in ("cub", "cars", "sop", "inshop")}
    fine_tuned = {f"baseline/{d}_{net}" for d in ("cub", "cars", "sop", "inshop") for net in ("vit", "dinov2")}
    assert set(PAPERS) == gca | intra | osm | mmsi | smart | baseline | fine_tuned
    assert set(PHOTOS) <= set(preset_names())
    assert {f"{method}/emoji" for method in METHODS} <= set(preset_names())


# What the papers' tables say, typed anew: [P, K], length, learning rates, decay, and what is particular to the method.
TABLE: dict[str, dict[str, Any]] = {
    "gca_hng/cub_resnet50": {"shape": (27, 3), "length": "100 epochs", "lr": 1.5e-4, "graph": 1.5e-4, "every": "10 epochs", "layers": 2, "heads": 4, "alpha": 5, "beta": 20, "dot": 20, "div": 60, "warmup": "2 epochs", "norm": "frozen"},
    "gca_hng/sop_googlenet": {"shape": (40, 2), "length": "150 epochs", "lr": 3e-4, "graph": 1.5e-4, "every": "15 epochs", "layers": 1, "heads": 2, "alpha": 5, "beta": 20, "dot": 20, "div": 20, "warmup": "1 epochs", "norm": "sync"},
    "gca_hng/inshop_googlenet": {"shape": (40, 2), "length": "200 epochs", "lr": 3e-4, "graph": 1.5e-4, "every": "15 epochs", "layers": 1, "heads": 2, "alpha": 2, "beta": 20, "dot": 20, "div": 20, "warmup": "1 epochs", "norm": "sync"},
    "gca_hng/cub_googlenet": {"shape": (27, 3), "length": "150 epochs", "lr": 1e-4, "graph": 3e-4, "every": "30 epochs", "layers": 2, "heads": 4, "alpha": 4, "beta": 30, "dot": 10, "div": 10, "warmup": "1 epochs", "norm": "frozen"},
    "gca_hng/cars_dino": {"shape": (27, 3), "length": "100 epochs", "lr": 3e-5, "graph": 3e-4, "every": "10 epochs", "layers": 2, "heads": 4, "alpha": 2, "beta": 5, "dot": 20, "div": 20, "warmup": "2 epochs", "norm": "frozen"},
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_values_of_gca_hng(name: str) -> None:
    config, wanted = load_config(name), TABLE[name]
    m: Any = config.method
    assert (m.classes_per_batch, m.samples_per_class) == wanted["shape"]
    assert str(config.length) == wanted["length"] and config.model.batch_norm == wanted["norm"]
    assert (m.optimizer.lr, m.graph_optimizer.lr, m.classifier_optimizer.lr) == (wanted["lr"], wanted["graph"], 1e-3)
    assert (m.optimizer.weight_decay, m.graph_optimizer.weight_decay, m.classifier_optimizer.weight_decay) == (
        1e-4,
        1e-4,
        0.01,
    )
    assert m.optimizer.clip_value == m.graph_optimizer.clip_value == 10 and m.classifier_optimizer.clip_value is None
    assert str(m.optimizer.schedule.every) == wanted["every"] and m.optimizer.schedule.gamma == 0.5
    assert m.graph_optimizer.schedule.kind == "cosine" and m.classifier_optimizer.schedule.kind == "constant"
    assert (m.layers, m.heads, m.alpha, m.beta) == tuple(wanted[k] for k in ("layers", "heads", "alpha", "beta"))
    assert (m.similarity_weight, m.diversity_weight, m.softmax_weight) == (wanted["dot"], wanted["div"], 20)
    assert str(m.warmup) == wanted["warmup"] and m.similarity_mask == "correct" and m.base_loss == "npair"
    assert m.embedding_dim == (384 if name.endswith("dino") else 512) and m.orthogonal_neck == name.endswith("dino")


INTRA: dict[str, tuple[Any, ...]] = {
    "cub": (6, 9, 1.563663718906821e-4, 6.059722614369727e-6, 0.2, 1, 2, False, "number"),
    "cars": (10, 7, 3.6683239911604993e-4, 2.551918610962277e-9, 0.1111111111111, 2, 8, True, "combine"),
    "sop": (15, 6, 2.472471515853406e-4, 2.7650277063275255e-13, 0.6046908988578005, 1, 8, False, "combine"),
    "inshop": (14, 4, 1.1265974954242144e-4, 1.0554824926510768e-7, 0.18591347176280537, 1, 4, False, "combine"),
}


@pytest.mark.parametrize("dataset", INTRA)
def test_values_of_intra_batch(dataset: str) -> None:
    config = load_config(f"intra_batch/{dataset}_resnet50")
    m: Any = config.method
    found = (m.classes_per_batch, m.samples_per_class, m.optimizer.lr, m.optimizer.weight_decay, m.temperature, m.layers,
             m.heads, m.concatenate, m.sampler)  # fmt: skip
    assert found == INTRA[dataset]
    assert m.optimizer.name == "radam" and m.optimizer.decoupled and m.reload_best == (30, 50) and m.dropout == 0.1
    assert str(config.length) == "70 epochs" and config.model.pooling == "max"
    assert [str(x) for x in m.optimizer.schedule.milestones] == ["30 epochs"] and m.optimizer.schedule.gamma == 0.1
    released = load_config("intra_batch/sop_resnet50_released").method
    assert not released.graph  # type: ignore[attr-defined]


OSM: dict[str, tuple[Any, ...]] = {
    "cub": ("3000 steps", 5e-4, 3e-4, 0.8, (8, 7, 1), [500, 1000, 1500, 1501, 2000, 2001]),
    "cars": ("10000 steps", 1e-3, 5e-5, 0.8, (8, 7, 1), [1500, 3000, 4500, 6000]),
    "mars": ("100000 steps", 1e-3, 5e-4, 1.0, (3, 18, 9), [20000, 30000, 40000, 50000]),
    "lpw": ("65000 steps", 1e-3, 1e-4, 0.6, (3, 18, 9), [30000, 40000, 50000]),
}


@pytest.mark.parametrize("mode", ["paper", "caffe"])
@pytest.mark.parametrize("dataset", OSM)
def test_values_of_osm_caa(dataset: str, mode: str) -> None:
    config = load_config(f"osm_caa/{dataset}_bninception" + ("_caffe" if mode == "caffe" else ""))
    m: Any = config.method
    length, lr, decay, sigma, shape, milestones = OSM[dataset]
    assert str(config.length) == length and (m.optimizer.lr, m.optimizer.weight_decay, m.optimizer.momentum) == (
        lr,
        decay,
        0.9,
    )
    assert (m.classes_per_batch, m.samples_per_class, m.frames) == shape
    assert (m.mode, m.sigma, m.alpha, m.lam) == (mode, sigma, 1.2, 0.5)
    assert (m.caa_mean, m.caa_sigma, m.ce_mean, m.ce_sigma) == (1.0, 0.68, 0.5, 0.18)
    assert [str(x) for x in m.optimizer.schedule.milestones] == [f"{x} steps" for x in milestones]


MMSI: dict[str, tuple[Any, ...]] = {
    "cub_bninception": ("multi_similarity", 1e-7, 0.05, 100, None, 98, "max"),
    "cars_bninception": ("multi_similarity", 1e-7, 0.05, 100, None, 98, "max"),
    "sop_bninception": ("multi_similarity", 1e-7, 0.03, 1000, 1_000_000, 1000, "avg+max"),
    "cub_bninception_contrastive": ("contrastive", 1e-5, 0.8, 1, None, 98, "max"),
    "cars_bninception_contrastive": ("contrastive", 1e-5, 0.8, 1, None, 98, "max"),
}


@pytest.mark.parametrize("name", MMSI)
def test_values_of_mmsi(name: str) -> None:
    config = load_config(f"mmsi/{name}")
    m: Any = config.method
    found = (
        m.loss,
        m.optimizer.lr,
        m.margin,
        m.memory_per_class,
        m.memory_total,
        m.warmup_classes,
        config.model.pooling,
    )
    assert found == MMSI[name] and (m.alpha, m.beta, m.base, m.w_init, m.norm_scope) == (40, 2, 0.5, 0, "all")
    assert (m.classes_per_batch, m.samples_per_class, m.meta_classes, m.embedding_dim) == (16, 5, 10, 512)
    assert (m.optimizer.name, m.optimizer.weight_decay, m.meta_source) == ("adam", 5e-4, "train")
    t = config.data.transforms
    assert (t.size, t.resize, t.crop_scale, t.flip) == (227, 256, (0.16, 1), 0.5)
    assert [round(255 * x) for x in config.model.mean or ()] == [128, 117, 104] and config.model.batch_norm == "frozen"


@pytest.mark.parametrize("dataset", ["cub", "cars"])
def test_values_of_smart_mining(dataset: str) -> None:
    config, modern = (load_config(f"smart_mining/{dataset}_googlenet{profile}") for profile in ("", "_modern"))
    m: Any = config.method
    o = m.optimizer
    assert (o.name, o.lr, o.momentum, o.weight_decay, o.head_lr_multiplier) == ("sgd", 0.1, 0.9, 5e-4, 10)
    assert str(o.schedule.every) == "3 epochs" and o.schedule.gamma == 0.5 and str(config.length) == "20 epochs"
    assert (m.embedding_dim, m.margin, m.global_margin, m.random_epochs, m.mined_share) == (64, 0.2, 0.01, 2, 1)
    assert m.adaptive and 0.5 <= m.target_error <= 0.75 and config.data.transforms.size == 227
    assert m.model_copy(update={"optimizer": modern.method.optimizer}) == modern.method
    assert modern.method.optimizer.name == "adamw"


@pytest.mark.parametrize(
    "name", ["gca_hng/cub_resnet50", "gca_hng/cub_googlenet", "gca_hng/cub_dino", "osm_caa/cub_bninception"]
)
def test_backbones_of_the_papers_build(name: str) -> None:
    config: Config = load_config(name, ["model.weights=none"])
    trunk = build_trunk(config.model, config.data.transforms.size)
    assert (
        trunk.features
        == {"resnet50": 2048, "googlenet": 1024, "dino": 384, "bninception": 1024}[name.rsplit("_", 1)[1]]
    )


def test_tracklets_fit_the_plan() -> None:
    m: Any = load_config("osm_caa/mars_bninception").method
    plan = class_balanced(np.repeat(np.arange(5), 40), m.classes_per_batch, m.samples_per_class, 0, 0)
    assert plan.ids.shape[1] == 54
