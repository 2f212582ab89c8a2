"""The wheel works outside the tree: built, installed into an environment of its own, and trained with from an empty folder.

The environment sees the packages that the tests run with, but not the tree: dependencies are not installed again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from pipeline.data.store import Store

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parent.parent
CARRIED = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "methods",
    "pipeline",
    "tune_configs",
    "tests",
    "benchmarks",
    "tools",
)
TRAIN = """
import sys, methods, pipeline
print(methods.__file__, pipeline.__file__, sep="\\n", flush=True)
from pipeline.train import main
sys.exit(main(sys.argv[1:]))
"""
SETTINGS = ("name=wheel", "length=3 steps", "data.validation_fold=0", "data.transforms.size=24", "model.backbone=test_efficientnet",
            "model.weights=none", "method.classes_per_batch=4", "method.samples_per_class=3", "method.embedding_dim=8",
            "runtime.workers=0", "runtime.loader=in_process", "runtime.cpus_per_worker=1")  # fmt: skip


def run(*command: str | Path, cwd: Path, home: Path) -> str:
    """Standard output of a command that succeeds, in an environment that names no folder of this tree."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RAY", "PIP_"))}
    environment |= {"RAYDML_HOME": str(home), "HOME": str(home)}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """Builds the wheel from a copy of the tree, in which nothing of an earlier build lies."""
    source = folder / "source"
    source.mkdir()
    for name in CARRIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", folder, source, cwd=folder, home=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Makes an environment with the wheel, in front of the packages that this process sees; returns its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=folder, home=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    paths = sysconfig.get_paths()
    (site / "packages.pth").write_text("\n".join(dict.fromkeys((paths["purelib"], paths["platlib"]))) + "\n")
    return python


def check_contents(wheel: Path) -> None:
    """What the packages need at run time is in the wheel, and nothing else of the tree."""
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"methods", "pipeline", "tune_configs"}
    wanted = [
        p for package in ("methods", "pipeline", "tune_configs") for p in (ROOT / package).rglob("*") if p.is_file()
    ]
    missing = {str(p.relative_to(ROOT)) for p in wanted if "__pycache__" not in p.parts} - names
    assert not missing, missing
    assert {"methods/py.typed", "pipeline/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_trains_reports_and_evaluates_from_an_empty_folder(store: Store, tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    check_contents(wheel)
    environment, empty, home = tmp_path / "environment", tmp_path / "empty", tmp_path / "home"
    empty.mkdir()
    home.mkdir()
    python = install(wheel, environment)
    settings = [part for s in (*SETTINGS, f"data.source={store.folder.uri}") for part in ("--set", s)]
    output = run(python, "-c", TRAIN, "baseline/emoji", *settings, cwd=empty, home=home)
    for line in output.splitlines()[:2]:
        assert Path(line).is_relative_to(environment), f"{line} was imported, not the wheel's"
    assert "recall@1" in output
    report = (home / "runs" / "wheel" / "report.html").read_text()
    assert "<h1>wheel</h1>" in report and ".neighbour" in report
    assert "recall@1" in run(python, "-m", "pipeline.evaluate", "wheel", cwd=empty, home=home)
    assert run(environment / "bin" / "raydml", "list", "runs", cwd=empty, home=home).startswith("wheel  finished")
    assert not list(empty.iterdir())
