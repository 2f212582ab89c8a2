"""Environments in which a run has to come to the same weights, or to say in one line before the start what is missing."""

from __future__ import annotations

import os
import pwd
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline import train
from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.distributed.ray_session import check_token
from pipeline.errors import UserError
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values
from pipeline.training.launch import run_in_process

ROOT = Path(__file__).parents[3]
AN_HOUR_BACK = """\
import time
true_time, started = time.time, time.monotonic()

def shifted():  # by name, so that Ray can send it
    return true_time() - (3600 if time.monotonic() - started > 4 else 0)

time.time = shifted
"""
LONG = {"length": "6 epochs", "checkpoint.every": "1 epochs", "evaluation.clustering": False}


class Run:
    """The real command, in a process that begins as told.

    Args:
        root: The test's folder; storage is below it.
        store: The dataset.
    """

    def __init__(self, root: Path, store: Store) -> None:
        self.root, self.store = root, store
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "LC_", "LANG"))}
        self.environment |= {"OMP_NUM_THREADS": "1"}
        self.before: list[Callable[[], Any]] = []

    def umask(self) -> None:
        self.before.append(lambda: os.umask(0o077))

    def plain_locale(self) -> None:
        self.environment |= {"LANG": "C", "LC_ALL": "C"}

    def turkish_locale(self) -> None:
        self.environment |= {"LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8"}

    def no_home(self) -> None:
        self.environment.pop("HOME", None)

    def few_files(self) -> None:
        self.before.append(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)))

    def clock_back(self) -> None:
        (self.root / "modules").mkdir()
        (self.root / "modules" / "sitecustomize.py").write_text(AN_HOUR_BACK)
        self.environment["PYTHONPATH"] = str(self.root / "modules")

    def __call__(self, changes: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Trains; gives the weights of the newest checkpoint."""
        storage = self.root / "storage"
        recipe = self.root / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(tiny_values(str(storage), self.store.folder.uri, {**LONG, **changes})))
        command = [sys.executable, "-m", "pipeline.train", str(recipe)]

        def begin() -> None:
            for step in self.before:
                step()

        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, preexec_fn=begin, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return weights(storage)


ALL = [Run.umask, Run.plain_locale, Run.no_home, Run.few_files, Run.clock_back]


def weights(storage: Path) -> dict[str, torch.Tensor]:
    newest = sorted((storage / "runs" / "tiny" / "checkpoints").iterdir())[-1]
    return {f"{n}/{k}": v for n in ("trunk", "method") for k, v in load_file(newest / f"{n}.safetensors").items()}


def reference(make_config: Callable[..., Config], store: Store, root: Path) -> dict[str, torch.Tensor]:
    config = make_config(LONG).model_copy(update={"storage": str(root / "reference")})
    run_in_process(config, store.folder.uri, lambda _: None)
    return weights(root / "reference")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_all_of_them_at_once(make_config: Callable[..., Config], store: Store, tmp_path: Path) -> None:
    run = Run(tmp_path, store)
    for change in ALL:
        change(run)
    assert_same(run({}), reference(make_config, store, tmp_path))
    for path in (tmp_path / "storage" / "runs").rglob("*"):
        assert not path.stat().st_mode & 0o077, f"{path} is open to others, against the umask"


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("change", [*ALL, Run.turkish_locale], ids=lambda change: change.__name__)
def test_each_with_a_ray_worker(
    change: Callable[[Run], None], make_config: Callable[..., Config], store: Store, tmp_path: Path
) -> None:
    run = Run(tmp_path, store)
    change(run)
    assert_same(run({"runtime.workers": 1, "runtime.loader": "ray"}), reference(make_config, store, tmp_path))


# ---- no home folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """HOME is not set, and the system does not know the user; Ray has no token."""

    def unknown(number: int) -> Any:
        raise KeyError(number)

    for name in ("HOME", "RAYDML_HOME", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_default_storage_needs_a_home(
    nobody: None, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such user"):
        Folder("~no_such_user/x")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_values("", store.folder.uri, {"cache.folder": None})))
    assert train.main([str(recipe)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: storage '~/raydml' is below a home folder that there is not (HOME is not set")
    assert os.listdir(tmp_path) == ["recipe.yaml"], "no folder of the name ~"


def test_a_ray_that_is_started_here_needs_a_home(nobody: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"HOME is not set, and the system does not know this user\): set HOME to a folder"
    ):
        check_token()
    monkeypatch.setenv("HOME", "/proc/nobody")
    with pytest.raises(UserError, match=r"/proc/nobody/\.ray/auth_token, which cannot be written"):
        check_token()
    for name, value in (("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_TOKEN_PATH", "/x"), ("RAY_AUTH_MODE", "disabled")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            check_token()


def test_the_token_is_for_this_user_alone(nobody: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0)
    try:
        check_token()
    finally:
        os.umask(before)
    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    first = token.read_text()
    assert len(first) >= 32 and os.listdir(token.parent) == ["auth_token"]
    token.chmod(0o644)  # as Ray makes it
    check_token()
    assert token.read_text() == first and stat.S_IMODE(token.stat().st_mode) == 0o600
