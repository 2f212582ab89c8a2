"""Two steps on synthetic pixels: of every method, alone and as one of several workers."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import METHODS
from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.diagnosis import measured_step
from pipeline.diagnosis.measured_step import StepProcess, StepTimeout, made_up_samples, measure
from pipeline.errors import RunError

SHIPPED = sorted(METHODS)
BATCH = {"classes_per_batch": 4, "samples_per_class": 2}
SETTINGS: dict[str, dict[str, Any]] = {"smart_mining": {"triplets_per_batch": 4}}


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_method_makes_its_steps(name: str, make_config: Callable[..., Config], tmp_path: Path) -> None:
    section = {"name": name, "embedding_dim": 8, **SETTINGS.get(name, BATCH)}
    config = make_config({"method": section, "model.batch_norm": "frozen", "precision": "float32"})
    found = measure(config, made_up_samples(config))
    assert found.peak_bytes > found.shared_bytes > 0 and found.start_bytes > 0 and found.gpu_bytes is None
    assert found.checkpoint_bytes > 0 and found.seconds > 0 and found.images > 0 and found.classes == 1000
    assert not (tmp_path / "runs").exists(), "nothing is written to the storage"


def test_a_worker_among_several_has_its_share(make_config: Callable[..., Config], store: Store) -> None:
    samples = store.select(["train"], without_fold=0)
    alone = measure(make_config(), samples)
    shared = measure(make_config({"runtime.workers": 3}), samples)
    assert (alone.images, shared.images) == (12, 4)
    assert shared.checkpoint_bytes == alone.checkpoint_bytes
    assert not torch.distributed.is_initialized()


def test_the_pixels_are_those_of_training_and_of_evaluation(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"name": "smart_mining", "embedding_dim": 8, **SETTINGS["smart_mining"]}
    config = make_config({"method": section, "data.transforms.evaluation_scale": 1.5})
    sizes, noise = set(), measured_step.noise

    def watched(images: int, size: int, device: torch.device) -> torch.Tensor:
        sizes.add(size)
        return noise(images, size, device)

    monkeypatch.setattr(measured_step, "noise", watched)
    measure(config, made_up_samples(config))
    assert sizes == {24, 36}, "the whole set is embedded at the size of evaluation"


@pytest.mark.slow
def test_memory_grows_with_the_images(store: Store, make_config: Callable[..., Config]) -> None:
    """In processes of their own: the peak of this one is that of earlier tests."""
    small, large = (StepProcess(make_config({"data.transforms.size": size}), store.folder.uri) for size in (24, 192))
    before, after = small.result(), large.result()
    assert (
        after.peak_bytes > before.peak_bytes + 20_000_000 and abs(after.start_bytes - before.start_bytes) < 60_000_000
    )


@pytest.mark.parametrize(
    ("changes", "uri", "said"),
    [
        ({}, "nowhere", "no prepared dataset in"),
        ({"model.backbone": "resnet5O"}, None, "did you mean 'resnet50'"),
    ],
)
def test_a_step_that_cannot_be_made_says_why(
    changes: dict[str, Any],
    uri: str | None,
    said: str,
    make_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = make_config(changes).model_dump(mode="json")
    request = {"config": values, "store": uri and str(tmp_path / uri)}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    assert measured_step.main() == 0
    assert said in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9: is its memory enough"),
        ("import sys; sys.exit('no torch here')", "no torch here"),
        (
            f"print({json.dumps(json.dumps({'error': 'CUDA out of memory'}))!r}[1:-1].replace(chr(92), ''))",
            "CUDA out of memory",
        ),
    ],
)
def test_a_process_that_dies(
    program: str, said: str, make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "program.py").write_text(program)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/program.py\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RunError, match=said):
        StepProcess(make_config(), None).result()


def test_a_process_that_takes_too_long_is_ended(make_config: Callable[..., Config]) -> None:
    with pytest.raises(StepTimeout, match=r"more than 0\.1 s"):
        StepProcess(make_config(), None).result(timeout_s=0.1)


def test_made_up_samples_are_enough_for_a_batch(make_config: Callable[..., Config]) -> None:
    made = made_up_samples(make_config({"method.samples_per_class": 20}))
    assert len(made) == 20_000 and made.tracks is not None
