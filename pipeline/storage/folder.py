"""Files by URI, the same calls for a local path and for object storage ("s3://bucket/..."), through fsspec and s3fs.

Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...);
`pipeline.storage.s3` documents retries and errors. An object in object storage appears whole or not
at all.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import posixpath
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from pipeline.errors import RunError, UserError, check_address_is_public, one_line

_UNWRITABLE = {
    errno.ENOSPC: "there is no space left on the disk",
    errno.EDQUOT: "your share of the disk is used up",
    errno.EFBIG: "it is larger than a file may be here",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
}


PROBE_BYTES = 1024  # a full disk still takes empty files


class FileVersion(NamedTuple):
    """A file as it was written once; another one after it was written again.

    Attributes:
        written: When, seconds since 1970; object storage knows whole seconds.
        tag: Tells files apart that were written in the same second.
    """

    written: float
    tag: str

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> FileVersion:
        """The version in an entry of a listing by fsspec: of a local file, or of an object in object storage."""
        if "mtime" in entry:
            return cls(float(entry["mtime"]), str(entry["ino"]))
        return cls(entry["LastModified"].timestamp(), str(entry["ETag"]))


class Folder:
    """A folder on any file system; all paths given to its methods are relative to it.

    Args:
        uri: A local path (made absolute) or a URI such as "s3://bucket/prefix".
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        self.is_local = "://" not in text or text.startswith("file://")
        check_address_is_public(text)
        if self.is_local:
            text = os.path.expanduser(text.removeprefix("file://"))
            if text.split("/")[0].startswith("~"):
                raise UserError(
                    f"storage {text!r} is below a home folder that there is not (HOME is not set, or there is no such user): set HOME, "
                    "or give an absolute path (RAYDML_HOME, storage, cache.folder)"
                )
            text = os.path.abspath(text)
        self.uri = text.rstrip("/") or "/"
        self._fs: Any = None

    def __reduce__(self) -> Any:
        return Folder, (self.uri,)

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def fs(self) -> Any:
        if self._fs is None:
            try:
                if self.uri.startswith(("s3://", "s3a://")):
                    from pipeline.storage.s3 import S3, retry_timeout

                    self._fs = S3(retry_timeout())
                else:
                    self._fs = fsspec.core.url_to_fs(self.uri)[0]
            except (ImportError, ValueError) as error:
                raise UserError(f"storage {self.uri!r} cannot be opened: {error}") from error
        return self._fs

    def path(self, name: str = "") -> str:
        """The path that the file system's own calls (and pyarrow's) take."""
        bare = self.uri if self.is_local else self.fs._strip_protocol(self.uri)
        return posixpath.join(bare, name) if name else bare

    def exists(self, name: str = "") -> bool:
        return bool(self.fs.exists(self.path(name)))

    def names(self, name: str = "") -> list[str]:
        """Names of the entries of a subfolder, sorted; empty if there is none."""
        try:
            return sorted(posixpath.basename(p.rstrip("/")) for p in self.fs.ls(self.path(name), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def find(self) -> list[str]:
        """Paths of all files below, relative to this folder, sorted.

        Raises:
            OSError: A local folder cannot be listed.
        """
        root = self.path()
        if self.is_local:  # fsspec silently leaves out folders that it cannot list
            walk = os.walk(root, onerror=_raise_unless_missing, followlinks=True)
            paths = [os.path.join(place, name) for place, _, names in walk for name in names]
        else:
            paths = self.fs.find(root)
        return sorted(path[len(root) :].strip("/") for path in paths)

    def size(self, name: str) -> int:
        return int(self.fs.size(self.path(name)))

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of each file of a subfolder, by name, from one listing; empty if there is none."""
        try:
            entries = self.fs.ls(self.path(name), detail=True)
        except FileNotFoundError:
            return {}
        return {posixpath.basename(e["name"]): int(e["size"]) for e in entries if e["type"] == "file"}

    def versions(self, name: str) -> dict[str, FileVersion]:
        """When each file of a subfolder was written, by name, from one listing; empty if there is none."""
        try:
            entries = self.fs.ls(self.path(name), detail=True)
        except FileNotFoundError:
            return {}
        return {posixpath.basename(e["name"]): FileVersion.of(e) for e in entries if e["type"] == "file"}

    def read(self, name: str) -> bytes:
        return bytes(self.fs.cat_file(self.path(name)))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`.

        Raises:
            RunError: The file ends before.
        """
        data = bytes(self.fs.cat_file(self.path(name), start=start, end=end)) if start < end else b""
        if len(data) != end - start:
            raise RunError(f"{self.uri}/{name} gave {len(data)} of {end - start} bytes from {start}: copy it again")
        return data

    def open(self, name: str, size: int | None = None) -> io.IOBase:
        """Opens a file for random access; in object storage every read is one request, and so is an unknown size."""
        return open(self.path(name), "rb") if self.is_local else _Ranges(self, name, size)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file whole: a reader sees the old one or the new one, never a part.

        Raises:
            RunError: The disk is full; the old file, if any, is still there.
        """
        self.write_together({name: data})

    def write_together(self, files: Mapping[str, bytes]) -> None:
        """Writes some files whole, in order; a local disk that is too full for one of them gets none.

        Raises:
            RunError: The disk is full; the old files are still there.
        """
        if not self.is_local:
            for name, data in files.items():
                self.fs.pipe_file(self.path(name), data)
            return
        unfinished = {self.path(name): f"{self.path(name)}.{uuid.uuid4().hex}.part" for name in files}
        try:
            for (target, part), data in zip(unfinished.items(), files.values(), strict=True):
                with disk_full_as_error(target, len(data)):
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    with open(part, "wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
            for target, part in unfinished.items():
                os.replace(part, target)
        finally:
            for part in unfinished.values():
                Path(part).unlink(missing_ok=True)

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read(name))
        except ValueError as error:  # not JSON, or not even text
            raise UserError(f"{self.uri}/{name} is not valid JSON ({error}): restore it or start over") from error

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def remove(self, name: str = "") -> None:
        """Removes a file, or a subfolder with its content; does nothing if there is none."""
        if self.is_local:
            path = Path(self.path(name))
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        elif self.exists(name):
            self.fs.rm(self.path(name), recursive=True)

    def check_writable(self) -> None:
        """Raises UserError in one line unless a file can be written and removed here; makes no folder.

        Where the folder does not exist yet, in the nearest one above it that does.
        """
        probe = f".write-test-{uuid.uuid4().hex}"
        folder = self
        if self.is_local:
            path = Path(self.uri)
            folder = Folder(str(next(place for place in (path, *path.parents) if os.path.lexists(place))))
        try:
            folder.write(probe, bytes(PROBE_BYTES))
            folder.remove(probe)
        except Exception as error:  # every file system has its own errors for "not allowed"
            reason = one_line(error)
            if isinstance(error, OSError) and error.filename:  # not the name of the probe
                reason = f"[Errno {error.errno}] {error.strerror}: {folder.uri!r}"
            raise UserError(f"storage {self.uri!r} is not writable ({reason})") from error


@contextlib.contextmanager
def disk_full_as_error(path: str | os.PathLike[str], num_bytes: int) -> Iterator[None]:
    """A block that writes a file: no room for it, or no right to, becomes a RunError of one line, which says where and how much."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise RunError(
            f"{path} ({num_bytes / 1e6:,.1f} MB) cannot be written: {_UNWRITABLE[error.errno]} ({os.strerror(error.errno)}); "
            "make room, or write elsewhere"
        ) from error


class _Ranges(io.RawIOBase):
    """Random access to a file in object storage, one request for each read."""

    def __init__(self, folder: Folder, name: str, size: int | None) -> None:
        self._folder, self._name, self._at = folder, name, 0
        self._size = folder.size(name) if size is None else size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = max(self._at, min(self._at + len(buffer), self._size))
        data = self._folder.read_range(self._name, self._at, end)
        buffer[: len(data)] = data
        self._at = end
        return len(data)


def read_file(uri: str) -> bytes:
    """Reads a file, given by its path or URI."""
    if "://" not in uri:
        with open(uri, "rb") as file:
            return file.read()
    parent, _, name = Folder(uri).uri.rpartition("/")
    return Folder(parent or "/").read(name)


def home() -> str:
    """The default folder of runs and prepared data: $RAYDML_HOME, else ~/raydml."""
    return os.environ.get("RAYDML_HOME") or os.path.expanduser("~/raydml")


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
