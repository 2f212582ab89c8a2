"""What a node says about itself: limits of containers, listening addresses, folders that can be written."""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from pathlib import Path

import pytest

from pipeline.diagnosis import imports
from pipeline.diagnosis.imports import PACKAGES, code_version, import_facts, import_facts_of_a_process
from pipeline.diagnosis.node_facts import NodeFacts, Wanted, clock, gather, listening_addresses, memory, write_error
from pipeline.storage import Folder

MEMINFO = "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:   12000000 kB\n"


def machine(root: Path, groups: str = "", files: dict[str, object] | None = None) -> str:
    """A folder with proc and sys of a machine of 16 GB."""
    for name, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups, **(files or {})}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return str(root)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, (16_384_000_000, 12_288_000_000, "machine")),
        ("0::/\n", {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": 5}, (16_384_000_000, 12_288_000_000, "machine")),
        ("0::/\n", {"sys/fs/cgroup/memory.max": 4 << 30, "sys/fs/cgroup/memory.current": 1 << 30}, (4 << 30, 3 << 30, "container")),
        (  # the limit of a group above
            "0::/job/task\n",
            {"sys/fs/cgroup/job/memory.max": 2 << 30, "sys/fs/cgroup/job/memory.current": 1 << 30,
             "sys/fs/cgroup/job/task/memory.max": "max", "sys/fs/cgroup/job/task/memory.current": 0},
            (2 << 30, 1 << 30, "container"),
        ),
        (  # version 1, whose "no limit" is a large number
            "5:memory:/docker/x\n1:cpu:/\n",
            {"sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712, "sys/fs/cgroup/memory/memory.usage_in_bytes": 1,
             "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": 1 << 30,
             "sys/fs/cgroup/memory/docker/x/memory.usage_in_bytes": 1 << 29},
            (1 << 30, 1 << 29, "container"),
        ),
        ("5:memory:/\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712, "sys/fs/cgroup/memory/memory.usage_in_bytes": 1},
         (16_384_000_000, 12_288_000_000, "machine")),
    ],
)  # fmt: skip
def test_memory_of_a_machine_and_of_a_container(
    tmp_path: Path, groups: str, files: dict[str, object], expected: tuple[int, int, str]
) -> None:
    assert memory(machine(tmp_path, groups, files)) == expected


def test_listening_addresses(tmp_path: Path) -> None:
    with socket.socket() as here, socket.socket() as everywhere, socket.socket(socket.AF_INET6) as six:
        here.bind(("127.0.0.1", 0))
        here.listen()
        port = here.getsockname()[1]
        everywhere.bind(("0.0.0.0", 0))
        everywhere.listen()
        six.bind(("::1", 0))
        six.listen()
        assert listening_addresses(port) == ("127.0.0.1",)
        assert listening_addresses(everywhere.getsockname()[1]) == ("0.0.0.0",)
        assert listening_addresses(six.getsockname()[1]) == ("::1",)
    assert listening_addresses(port) == ()
    lines = [
        "  sl  local_address rem_address   st",
        "   0: 0000000000000000FFFF00000100000A:1F90 0000000000000000:0000 0A",  # ::ffff:10.0.0.1
        "   1: 00000000000000000000000000000000:1F90 0000000000000000:0000 0A",
        "   2: 00000000000000000000000001000000:1F90 0000000000000000:0000 01",  # a connection
    ]
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/net/tcp6").write_text("\n".join(lines))
    assert listening_addresses(8080, str(tmp_path)) == ("10.0.0.1", "::")


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    assert write_error(Folder(deep)) is None and not (tmp_path / "a").exists()
    deep.mkdir(parents=True)
    (deep / "x").write_text("kept")
    assert write_error(Folder(deep)) is None and os.listdir(deep) == ["x"]
    (tmp_path / "file").write_text("")
    error = write_error(Folder(tmp_path / "file" / "below"))
    assert error is not None and "not writable" in error and "\n" not in error


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        error = write_error(Folder(tmp_path / "new"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error is not None and "larger than a file may be" in error
    assert not (tmp_path / "new").exists()


def test_facts_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "probe").write_text("")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "copy.arrow").write_text("")
    wanted = Wanted(str(tmp_path), "probe", str(tmp_path / "cache"), "copy.arrow")
    facts = NodeFacts("here", **gather(wanted, import_facts))
    assert facts.errors == {} and set(facts.versions) == {"python", "raydml", *PACKAGES}
    assert facts.storage_error is None and facts.cache_error is None and facts.sees_probe and facts.cached
    assert facts.memory_bytes > facts.free_memory_bytes > 0 and facts.storage_free_bytes and facts.open_files[0] > 0
    assert facts.ray_gpus is None and facts.resources is None
    assert abs(clock() - time.time()) < 1
    missing = NodeFacts("here", **gather(Wanted(str(tmp_path), "other", str(tmp_path / "c"), "x"), import_facts))
    assert not missing.sees_probe and not missing.cached and not (tmp_path / "c").exists()


def test_the_code_has_a_digest_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "methods").mkdir()
    monkeypatch.setattr(imports, "ROOT", str(tmp_path))
    (tmp_path / "methods" / "a.py").write_text("x = 1\n")
    first = code_version()
    (tmp_path / "methods" / "a.py").write_text("x = 2\n")
    assert first != code_version()


def test_a_package_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("raise OSError('libcublas.so.12: cannot open')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(imports, "PACKAGES", ("numpy", "broken", "no_such_package"))
    facts = import_facts()
    assert facts["errors"]["broken"] == "OSError: libcublas.so.12: cannot open"
    assert facts["errors"]["no_such_package"].startswith("ModuleNotFoundError") and "numpy" in facts["versions"]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import time; time.sleep(60)", "not imported within 0.5 s"),
        ("import os; os.abort()", "ended with status -6"),
        ("import sys; print('no memory', file=sys.stderr); sys.exit(3)", "status 3: no memory"),
    ],
)
def test_an_import_that_hangs_or_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    facts = import_facts_of_a_process(timeout_s=0.5 if "sleep" in program else 20.0)
    assert said in facts["errors"]["torch"] and facts["versions"]["python"]
