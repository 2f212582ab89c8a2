"""Archives (.zip and .tar, compressed or not) as others made them, unpacked into a folder that is removed afterwards.

Nothing is trusted: only regular files are written, below that folder; a link becomes a copy of the file that it points to
within its archive. Whatever else a member is or points to, the archive is refused, and so is one that unpacks to far more
than its size (photographs do not: about 1×).
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
RATIO = 20  # a dataset's files together may unpack to so many times their size
FLOOR = 1 << 30  # bytes that may always be unpacked
BUFFER = 8 << 20  # bytes of one request to object storage
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, NotImplementedError)


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def stem(name: str) -> str:
    """Name of an archive without folder and suffix: "a/CUB.tar.gz" is "CUB"."""
    base = posixpath.basename(name)
    return base[: -max(len(s) for s in SUFFIXES if base.lower().endswith(s))]


@dataclass(frozen=True)
class Member:
    """A file of an archive, by its path from the top: how it is read, or for a link the path of the file it points to."""

    name: str
    open: Callable[[], Any] | None
    link: str = ""


class Unpacker:
    """Unpacks archives below one folder, with one allowance for all of them.

    Args:
        place: the folder.
        allowed: bytes that may be written in all.
    """

    def __init__(self, place: Path, allowed: int) -> None:
        self.place, self.left = place, allowed

    def __call__(self, archive: str, below: str = "") -> None:
        """Unpacks into a subfolder.

        Raises:
            UserError: the archive is damaged, encrypted, too large once unpacked, or has a member that is neither a file nor
                a folder inside it. What was written stays; the whole folder is to be removed.
        """
        try:
            with _open(archive) as file:
                for member in _members(archive, file, self._take):
                    self._write(archive, below, member)
        except DAMAGED as error:
            raise UserError(f"{archive} is damaged ({type(error).__name__}: {error}): download it again") from error
        except OSError as error:
            raise UserError(f"{archive} cannot be unpacked in {self.place} ({error}): set --scratch") from error

    def _take(self, archive: str, size: int) -> None:
        """Takes bytes off the allowance."""
        free = shutil.disk_usage(self.place).free
        if size > free:
            raise UserError(
                f"{archive} needs {size >> 20:,} MiB, {self.place} has {free >> 20:,} MiB free: set --scratch to a folder "
                "with more room"
            )
        if size > self.left:
            raise UserError(
                f"{archive} unpacks to {(size - self.left) >> 20:,} MiB more than allowed: "
                "raise --max-unpacked (GiB) if you trust it"
            )
        self.left -= size

    def _write(self, archive: str, below: str, member: Member) -> None:
        path = self.place / below / member.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if member.open is not None:
            with member.open() as source, open(path, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            return
        target = self.place / below / member.link
        if not target.is_file():
            raise UserError(f"{archive}: {member.name} is a link to {member.link}, which is no file before it: refused")
        self._take(archive, target.stat().st_size)
        shutil.copyfile(target, path)


def _open(archive: str) -> Any:
    """The file of an archive, to read from at any place.

    Raises:
        UserError: it may not be read.
    """
    if "://" not in archive:
        try:
            return open(archive, "rb")
        except OSError as error:
            raise UserError(f"{archive} cannot be read ({error.strerror}): see to its path and permissions") from error
    folder, _, name = archive.rpartition("/")
    return io.BufferedReader(Folder(folder).open(name), BUFFER)  # type: ignore[arg-type]


def _members(archive: str, file: Any, take: Callable[[str, int], None]) -> Iterator[Member]:
    """Files and links, each with its bytes taken off the allowance; of a zip all before the first is written."""
    if archive.lower().endswith(".zip"):
        with zipfile.ZipFile(file) as zipped:
            infos = [info for info in zipped.infolist() if not info.is_dir()]
            take(archive, sum(info.file_size for info in infos))
            for info in infos:
                yield _zip_member(archive, zipped, info)
        return
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        while (found := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else it remembers every member, about a kilobyte each
            if found.isdir():
                continue
            take(archive, found.size)
            yield _tar_member(archive, tar, found)


def _zip_member(archive: str, zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    name, mode = _spelled(info), info.external_attr >> 16
    if info.flag_bits & 1:
        raise UserError(f"{archive} is encrypted ({name}): unpack it yourself and name the folder")
    if stat.S_ISLNK(mode):
        target = zipped.open(info).read(4096).decode("utf-8", "replace")
        return Member(_inside(archive, name), None, _target(archive, name, posixpath.dirname(name), target))
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise UserError(f"{archive}: {name} is a device or pipe: refused")
    return Member(_inside(archive, name), lambda: zipped.open(info))


def _spelled(info: zipfile.ZipInfo) -> str:
    """Its name; one that is not marked as UTF-8, but is, is read as such, not as the code page 437 of the format."""
    if not info.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            return info.filename.encode("cp437").decode("utf-8")
    return info.filename


def _tar_member(archive: str, tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    name = _inside(archive, info.name)
    if info.issym():
        return Member(name, None, _target(archive, name, posixpath.dirname(name), info.linkname))
    if info.islnk():
        return Member(name, None, _target(archive, name, "", info.linkname))
    if not info.isfile():
        raise UserError(f"{archive}: {info.name} is a device or pipe: refused")
    return Member(name, lambda: tar.extractfile(info))


def _inside(archive: str, name: str) -> str:
    """A member's path from the top of its archive, refused if it leads out of it."""
    path = name.replace("\\", "/")
    if path.startswith("/") or path[1:3] == ":/" or ".." in path.split("/"):
        raise UserError(f"{archive} has the member {name!r}, outside of its own folder: refused")
    return posixpath.normpath(path)  # "./a" is "a"


def _target(archive: str, name: str, folder: str, link: str) -> str:
    """What a link points to, from the top of its archive; the link is written as seen from `folder`."""
    path = posixpath.normpath(posixpath.join(folder, link))
    if link.startswith("/") or path.split("/")[0] == "..":
        raise UserError(f"{archive}: {name} is a link to {link!r}, outside of its own folder: refused")
    return path


def names_in(archive: str) -> list[str] | None:
    """Paths of its members where they can be told without unpacking it: of a zip, or a tar that is not compressed.

    Raises:
        UserError: the archive is damaged, or a member is refused.
    """
    if not archive.lower().endswith((".zip", ".tar")):
        return None
    try:
        with _open(archive) as file:
            if archive.lower().endswith(".zip"):
                with zipfile.ZipFile(file) as zipped:
                    return [_inside(archive, _spelled(info)) for info in zipped.infolist() if not info.is_dir()]
            with tarfile.open(fileobj=file, mode="r:*") as tar:
                return [_inside(archive, info.name) for info in tar if not info.isdir()]
    except DAMAGED as error:
        raise UserError(f"{archive} is damaged ({type(error).__name__}: {error}): download it again") from error


@contextlib.contextmanager
def scratch_folder(parent: str) -> Iterator[Path]:
    """An empty folder below `parent` that is removed with all it holds."""
    try:
        Path(parent).mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=".raydml-unpacked-", dir=parent)
    except OSError as error:
        raise UserError(f"scratch folder {parent} cannot be used ({error}): set --scratch") from error
    with made as place:
        yield Path(place)
