"""A secret of the environment is found nowhere: not in what is written, not in what is printed, not in the list of processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import doctor, evaluate, show_config, train
from pipeline.data.store import Store
from pipeline.errors import RunError, UserError, masked, one_line
from pipeline.storage import Folder
from pipeline.storage.s3 import RETRY_TIMEOUT, S3
from pipeline.testing.tiny import tiny_values
from pipeline.training import start

SECRET = "M4RKED-5ECRET"  # of every kind: a key, a token, a password
ROOT = Path(__file__).parents[2]


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")


def files_with_secret(root: Path) -> list[str]:
    return [str(p) for p in root.rglob("*") if p.is_file() and not p.is_symlink() and SECRET.encode() in p.read_bytes()]


def test_a_run_in_object_storage(
    bucket: str,
    secrets: None,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    S3.clear_instance_cache()
    changes = {"cache.folder": str(tmp_path / "cache"), "length": "2 steps"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_values(bucket, store.folder.uri, changes)))
    assert train.main([str(recipe)]) == 0
    assert evaluate.main([f"{bucket}/runs/tiny", "--embed-to", str(tmp_path / "embeddings"), "--workers", "0"]) == 0
    assert show_config.main([str(recipe)]) == 0
    assert doctor.main([str(recipe), "--json", "--set", "name=other"]) == 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:9")
    monkeypatch.setenv(RETRY_TIMEOUT, "0")
    S3.clear_instance_cache()
    assert train.main([str(recipe)]) in (1, 2)
    printed = "".join(capsys.readouterr())
    assert "report:" in printed and "error: " in printed and SECRET not in printed
    assert files_with_secret(tmp_path) == []
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"s3://key:{SECRET}@bucket/raydml", "s3://***@bucket/raydml"),
        (f"s3://bucket/raydml?secret_key={SECRET}", "s3://bucket/raydml?***"),
        (f"https://host/x?X-Amz-Signature={SECRET}&a=b", "https://host/x?***"),
    ],
)
def test_addresses_with_credentials_are_refused_and_not_repeated(
    uri: str, shown: str, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="set the credentials in the environment") as caught:
        Folder(uri)
    assert repr(shown) in str(caught.value)
    recipe = tmp_path / "recipe.yaml"
    for key in ("storage", "data.source", "cache.folder"):
        recipe.write_text(yaml.safe_dump(tiny_values(str(tmp_path), store.folder.uri, {key: uri})))
        assert train.main([str(recipe)]) == 2, key
        assert doctor.main([str(recipe), "--json"]) in (1, 2), key
    recipe.write_text(yaml.safe_dump(tiny_values(uri, store.folder.uri, {"nme": "x"})))
    assert train.main([str(recipe), "--set", f"storag={uri}"]) == 2
    printed = "".join(capsys.readouterr())
    assert SECRET not in printed and "***" in printed
    assert files_with_secret(tmp_path) == [str(recipe)], "its own file, which the user wrote"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://a:b@c/d and http://e@f/", "s3://***@c/d and http://***@f/"),
        ("'https://h/p?q=r&s=t' failed", "'https://h/p?***' failed"),
        ("is it s3://bucket/x? a=b", "is it s3://bucket/x? a=b"),
        ("mail a@b.c, see http://h/p", "mail a@b.c, see http://h/p"),
    ],
)
def test_masked(text: str, expected: str) -> None:
    assert masked(text) == expected == one_line(UserError(text))


def test_the_end_of_ray_is_one_line_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("The actor died.\n\tnamespace: x\n\tip: 1.2.3.4")
    told = start.ray_error(error)
    assert isinstance(told, RunError) and "(The actor died.)" in str(told) and "logs of Ray" in str(told)
    monkeypatch.setattr(start, "SHM_BYTES", 1 << 62)
    assert "/dev/shm is full: make room there; the newest checkpoint is kept" in str(start.ray_error(error))


# ---- with processes ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched_processes() -> Iterator[set[str]]:
    """Command lines that hold the secret, of all processes while the block runs."""
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if SECRET in line:
                        seen.add(line)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def test_the_watch_sees_a_secret() -> None:
    with watched_processes() as seen:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)", SECRET])
        deadline = time.monotonic() + 10
        while not seen and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()
    assert seen


@pytest.mark.slow
@pytest.mark.cluster
def test_a_run_with_ray(
    secrets: None, bucket: str, store: Store, tmp_path: Path, make_config: Callable[..., Any]
) -> None:
    """Workers, loaders and mining servers in object storage: Ray's own logs, command lines and notes are looked through too."""
    temporary = Path(f"/tmp/s{os.getpid()}")
    method = {"name": "smart_mining", "triplets_per_batch": 4, "embedding_dim": 8}
    changes = {
        "cache.folder": str(tmp_path / "cache"),
        "length": "2 steps",
        "runtime.workers": 1,
        "runtime.loader": "ray",
        "method": method,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_values(bucket, store.folder.uri, changes)))
    environment = dict(os.environ) | {
        "RAY_TMPDIR": str(temporary),
        "RAY_AUTH_TOKEN": f"{SECRET}-{'0' * 32}",
        "RAY_AUTH_MODE": "token",
    }
    with watched_processes() as seen:
        command = [sys.executable, "-m", "pipeline.train", str(recipe)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr and seen == set()
    assert files_with_secret(tmp_path) == [] and files_with_secret(temporary) == []
    assert list(temporary.rglob("*.log")), "Ray's logs were there to look at"
    there = Folder(bucket)
    written = there.find()
    assert len(written) > 5 and [name for name in written if SECRET.encode() in there.read(name)] == []
    assert json.loads(there.read("runs/tiny/summary.json"))["step"] == 2
