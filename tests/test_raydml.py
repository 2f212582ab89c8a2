"""raydml as a library: what it exports, what importing it costs, training and measuring through it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import raydml
from pipeline.config import Config
from pipeline.data.store import Store


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = {"torch", "ray", "timm", "torchvision", "numpy", "pydantic", "pipeline.config"}
    code = f"import sys, raydml; dir(raydml); print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_every_name_that_it_lists_is_there_and_others_are_not() -> None:
    for name in raydml.__all__:
        assert getattr(raydml, name) is not None
    with pytest.raises(AttributeError, match="module 'raydml' has no attribute 'lod'"):
        _ = raydml.lod


def test_loading_a_model_imports_neither_losses_nor_ray_nor_the_compiler(
    make_config: Callable[..., Config], store: Store
) -> None:
    from pipeline.runs.run_folder import run_folder
    from pipeline.training.launch import run_in_process
    from pipeline.training.start import record

    config = make_config({"length": "1 steps", "evaluation.test": False})
    record(config, run_folder(config), store, [])
    run_in_process(config, store.folder.uri, lambda _: None)
    unneeded = (
        "ray",
        "torch._dynamo",
        "scipy",
        "numba",
        "faiss",
        "sklearn",
        "pandas",
        "pytorch_metric_learning",
        "matplotlib",
    )
    code = (
        "import sys, numpy, raydml\n"
        f"rows = raydml.load({run_folder(config).uri!r}).embed(numpy.zeros((9, 9, 3), numpy.uint8))\n"
        f"print(tuple(rows.shape), [name for name in {unneeded!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(1, 8) []\n", done.stderr


@pytest.mark.parametrize("kind", ["tensor", "array", "lists"])
def test_evaluate_takes_tensors_arrays_and_lists(kind: str) -> None:
    rows = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [1.0, 1.0]]
    labels = ["a", "a", "b", "b", "a"]
    embeddings: Any = {"tensor": torch.tensor(rows), "array": np.array(rows), "lists": rows}[kind]
    result = raydml.evaluate(embeddings, labels, recall_at=[1, 2], clustering=True)
    assert result.metrics["recall@1"] == 100.0  # [1, 1] is as near to [0.9, 0.1] as to [0.1, 0.9]: the first row wins
    assert result.metrics["queries"] == 5 and result.class_names == ["a", "b"] and "nmi" in result.metrics
    assert result.retrieval.neighbours[0, 0] == 1 and result.labels.tolist() == [0, 0, 1, 1, 0]


def test_evaluate_against_a_gallery() -> None:
    result = raydml.evaluate(
        torch.eye(2), torch.tensor([0, 1]), gallery=torch.tensor([[1.0, 0.1], [1.0, 0.2]]), gallery_labels=[1, 0]
    )
    assert result.metrics["recall@1"] == 0.0 and result.metrics["recall@2"] == 100.0


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((torch.ones(3), [0, 0, 1]), {}, r"embeddings: got float32 \[3\], expected floats \[N, D\]"),
        ((torch.ones(3, 2, dtype=torch.int64), [0, 0, 1]), {}, r"embeddings: got int64 \[3, 2\]"),
        (
            (torch.ones(3, 2), [0, 1]),
            {},
            r"labels of the embeddings: got int64 \[2\], expected 3 whole numbers or texts",
        ),
        ((torch.ones(3, 2), [0.5, 1, 2]), {}, "labels of the embeddings: got float64"),
        ((torch.ones(3, 2), [0, 1, 2]), {}, "none of the 3 queries has another row of its class"),
        ((torch.ones(3, 2), [0, 0, 1]), {"recall_at": [0]}, r"recall_at is \[0\], expected numbers of at least 1"),
        ((torch.ones(3, 2), [0, 0, 1]), {"gallery": torch.ones(2, 2)}, "gallery and gallery_labels go together"),
        (
            (torch.ones(3, 2), [0, 0, 1]),
            {"gallery": torch.ones(2, 3), "gallery_labels": [0, 1]},
            "queries have 2 dimensions, the gallery has 3",
        ),
    ],
)
def test_bad_arrays_are_told_in_one_line(arguments: Any, options: Any, says: str) -> None:
    with pytest.raises(raydml.UserError, match=f"^{says}"):
        raydml.evaluate(*arguments, **options)


def test_train_gives_the_result_of_the_command(make_config: Callable[..., Config], tmp_path: Path) -> None:
    values = make_config({"length": "2 steps"}, name="lib").model_dump(mode="json")
    recipe = tmp_path / "lib.yaml"
    recipe.write_text(yaml.safe_dump(values))
    result = raydml.train(str(recipe), method={"embedding_dim": 6}, **{"data.transforms.size": 16})
    assert result.finished and result.step == 2 and result.name == "lib"
    summary = json.loads((tmp_path / "runs" / "lib" / "summary.json").read_text())
    assert result.metrics == summary["final"] and result.frozen == summary["frozen"] and result.metrics["recall@1"] >= 0
    assert result.report is not None and Path(result.report).is_file()
    model = result.model()
    assert model.dim == 6 and model.transforms.size == 16 and model.figures == summary
    with pytest.raises(raydml.UserError, match="as a run of its own: name='lib"):
        raydml.train(str(recipe), method={"embedding_dim": 5})
    with pytest.raises(raydml.UserError, match="embeding_dim"):
        raydml.train(str(recipe), method={"embeding_dim": 5}, name="other")
