"""Archives (.zip and .tar, compressed or not), unpacked into a folder that is removed afterwards.

Archives are not trusted: only regular files are written, below that folder; a link becomes a copy
of the file that it points to within its archive. An archive with any other member or link is
refused, and so is one that unpacks to far more than its size (photographs unpack to about 1×).
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import Folder

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_RATIO = 20  # the archives of a dataset together may unpack to so many times their size
MIN_ALLOWANCE_BYTES = 1 << 30  # may always be unpacked
BUFFER_BYTES = 8 << 20  # size of one request to object storage
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, NotImplementedError)


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def stem(name: str) -> str:
    """Name of an archive without folder and suffix: "a/CUB.tar.gz" is "CUB"."""
    base = posixpath.basename(name)
    return base[: -max(len(s) for s in SUFFIXES if base.lower().endswith(s))]


@dataclass(frozen=True)
class Member:
    """A file or link of an archive.

    Attributes:
        name: Its path from the top of the archive.
        open: Opens it for reading; None for a link.
        link: Path of the file that a link points to, from the top of the archive.
    """

    name: str
    open: Callable[[], Any] | None
    link: str = ""


class Unpacker:
    """Unpacks archives below one folder, with one limit for all of them.

    Args:
        folder: The folder.
        max_bytes: Upper bound for all files written together.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.remaining_bytes = max_bytes

    def __call__(self, archive: str, below: str = "") -> None:
        """Unpacks into a subfolder.

        Raises:
            UserError: The archive is damaged, encrypted, too large once unpacked, or has a member
                that is neither a file nor a folder inside it. Files already written stay; the
                caller removes the whole folder.
        """
        try:
            with _open(archive) as file:
                for member in _members(archive, file, self._reserve):
                    self._write(archive, below, member)
        except DAMAGED as error:
            raise UserError(f"{archive} is damaged ({type(error).__name__}: {error}): download it again") from error
        except OSError as error:
            raise UserError(
                f"{archive} cannot be unpacked in {self.folder} ({error}): set --scratch to another folder"
            ) from error

    def _reserve(self, archive: str, size: int) -> None:
        """Subtracts bytes from the limit; an error if they exceed it or the disk's free space."""
        free_bytes = shutil.disk_usage(self.folder).free
        if size > free_bytes:
            raise UserError(
                f"{archive} needs {size >> 20:,} MiB, {self.folder} has {free_bytes >> 20:,} MiB free: "
                "set --scratch to a folder with more room"
            )
        if size > self.remaining_bytes:
            raise UserError(
                f"{archive} would exceed the unpacking limit by {(size - self.remaining_bytes) >> 20:,} MiB: "
                "raise --max-unpacked (GiB) if you trust it"
            )
        self.remaining_bytes -= size

    def _write(self, archive: str, below: str, member: Member) -> None:
        path = self.folder / below / member.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if member.open is not None:
            with member.open() as source, open(path, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            return
        target = self.folder / below / member.link
        if not target.is_file():
            raise UserError(
                f"{archive}: {member.name} is a link to {member.link}, which is not a file earlier in the archive: refused"
            )
        self._reserve(archive, target.stat().st_size)
        shutil.copyfile(target, path)


def _open(archive: str) -> Any:
    """Opens an archive's file for random access.

    Raises:
        UserError: It cannot be read.
    """
    if "://" not in archive:
        try:
            return open(archive, "rb")
        except OSError as error:
            raise UserError(f"{archive} cannot be read ({error.strerror}): check its path and permissions") from error
    folder, _, name = archive.rpartition("/")
    return io.BufferedReader(Folder(folder).open(name), BUFFER_BYTES)  # type: ignore[arg-type]


def _members(archive: str, file: Any, reserve: Callable[[str, int], None]) -> Iterator[Member]:
    """Files and links of an archive; `reserve` is called with the size of each, for a zip with that of all at once."""
    if archive.lower().endswith(".zip"):
        with zipfile.ZipFile(file) as zipped:
            infos = [info for info in zipped.infolist() if not info.is_dir()]
            reserve(archive, sum(info.file_size for info in infos))
            for info in infos:
                yield _zip_member(archive, zipped, info)
        return
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else it remembers every member, about a kilobyte each
            if member.isdir():
                continue
            reserve(archive, member.size)
            yield _tar_member(archive, tar, member)


def _zip_member(archive: str, zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    name = _decoded_name(info)
    mode = info.external_attr >> 16
    if info.flag_bits & 1:
        raise UserError(f"{archive} is encrypted ({name}): unpack it yourself and pass the folder with --from")
    if stat.S_ISLNK(mode):
        target = zipped.open(info).read(4096).decode("utf-8", "replace")
        return Member(_safe_path(archive, name), None, _link_target(archive, name, posixpath.dirname(name), target))
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise UserError(f"{archive}: {name} is a device or pipe: refused")
    return Member(_safe_path(archive, name), lambda: zipped.open(info))


def _decoded_name(info: zipfile.ZipInfo) -> str:
    """The member's name: as UTF-8 where it is valid UTF-8, marked as such or not, else in the format's code page 437."""
    if not info.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            return info.filename.encode("cp437").decode("utf-8")
    return info.filename


def _tar_member(archive: str, tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    name = _safe_path(archive, info.name)
    if info.issym():
        return Member(name, None, _link_target(archive, name, posixpath.dirname(name), info.linkname))
    if info.islnk():
        return Member(name, None, _link_target(archive, name, "", info.linkname))
    if not info.isfile():
        raise UserError(f"{archive}: {info.name} is a device or pipe: refused")
    return Member(name, lambda: tar.extractfile(info))


def _safe_path(archive: str, name: str) -> str:
    """A member's path from the top of its archive, refused if it leads out of it."""
    path = name.replace("\\", "/")
    if path.startswith("/") or path[1:3] == ":/" or ".." in path.split("/"):
        raise UserError(f"{archive} has the member {name!r}, outside of its own folder: refused")
    return posixpath.normpath(path)  # "./a" is "a"


def _link_target(archive: str, name: str, folder: str, link: str) -> str:
    """Path that a link points to, from the top of its archive; `link` is relative to `folder`."""
    path = posixpath.normpath(posixpath.join(folder, link))
    if link.startswith("/") or path.split("/")[0] == "..":
        raise UserError(f"{archive}: {name} is a link to {link!r}, outside of its own folder: refused")
    return path


def names_in(archive: str) -> list[str] | None:
    """Paths of an archive's files; None where only unpacking would tell them (a compressed tar).

    Raises:
        UserError: The archive is damaged, or a member is refused.
    """
    if not archive.lower().endswith((".zip", ".tar")):
        return None
    try:
        with _open(archive) as file:
            if archive.lower().endswith(".zip"):
                with zipfile.ZipFile(file) as zipped:
                    return [_safe_path(archive, _decoded_name(info)) for info in zipped.infolist() if not info.is_dir()]
            with tarfile.open(fileobj=file, mode="r:*") as tar:
                return [_safe_path(archive, info.name) for info in tar if not info.isdir()]
    except DAMAGED as error:
        raise UserError(f"{archive} is damaged ({type(error).__name__}: {error}): download it again") from error


@contextlib.contextmanager
def scratch_folder(parent: str) -> Iterator[Path]:
    """A new folder below `parent`, removed with its content at the end of the block."""
    try:
        Path(parent).mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".raydml-unpacked-", dir=parent)
    except OSError as error:
        raise UserError(f"scratch folder {parent} cannot be used ({error}): set --scratch") from error
    with folder as path:
        yield Path(path)
