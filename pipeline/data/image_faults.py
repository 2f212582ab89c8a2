"""Why a file could not be read as an image, in words for a person."""

from __future__ import annotations

import os

_KINDS = (
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"7z\xbc\xaf", "a 7-Zip archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript file"),
    (0, b"\xd0\xcf\x11\xe0", "a Windows file such as Thumbs.db"),
    (0, b"version https://git-lfs", "a Git LFS pointer, the image itself was not downloaded (git lfs pull)"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL image, which cannot be read: convert it to JPEG or PNG"),
    (0, b"\xff\x0a", "a JPEG XL image, which cannot be read: convert it to JPEG or PNG"),
    (0, b"\x1aE\xdf\xa3", "a video"),
    (8, b"AVI ", "a video"),
    (0, b"ID3", "an audio file"),
    (8, b"WAVE", "an audio file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x7fELF", "a program"),
    (0, b"MZ", "a program"),
    (0, b"SQLite", "a database"),
)  # offset, bytes there, what it is
_IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def explain(path: str, data: bytes | None, error: Exception) -> str:
    """The reason for `rejected.csv`: one line, without the path or an address in memory.

    Args:
        path: The file.
        data: Its bytes; None if it could not be read at all.
        error: What was raised.
    """
    if data is None:
        if isinstance(error, FileNotFoundError):
            return "a link to a file that does not exist" if os.path.islink(path) else "there is no such file"
        if isinstance(error, PermissionError):
            return "no permission to read the file"
        if isinstance(error, IsADirectoryError):
            return "a folder, not a file"
        return _one_line(error, path)
    if not data:
        return "the file is empty (0 bytes)"
    if not data.strip(b"\x00"):
        return f"the file holds {len(data):,} zero bytes, as an interrupted copy leaves it"
    kind = _kind(data)
    if kind:
        return kind
    text = _one_line(error, path)
    if "truncated" in text or "Truncated" in text or "incomplete" in text:
        return f"the image is truncated: the end of the file is missing ({text})"
    if "cannot identify" in text and data.startswith(_IMAGES):
        return "the image is damaged: its first bytes are right, what follows cannot be read"
    if "cannot identify" in text:
        return f"no image of a known format: it begins with {data[:8].hex(' ')}"
    return f"the image is damaged or of an unusual kind: {text}" if "pixels" not in text and "box" not in text else text


def _kind(data: bytes) -> str | None:
    """What a file is that is no image that can be read; None for what may be one."""
    for offset, mark, kind in _KINDS:
        if data[offset : offset + len(mark)] == mark:
            return f"{kind}{'' if 'image' in kind else ', not an image'}"
    if data[4:8] == b"ftyp":
        if data[8:12] in _HEIF:
            return "a HEIC image, as phones take them, which cannot be read: convert it to JPEG"
        if data[8:12] not in (b"avif", b"avis"):
            return "a video, not an image"
    return _kind_of_text(data[:2048])


def _kind_of_text(start: bytes) -> str | None:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "a web page (HTML), not an image: the download failed, download it again"
    if b"<svg" in text:
        return "an SVG drawing, which has no pixels: convert it to PNG"
    if text.startswith((b"<?xml", b"<error")):
        return "an XML file, not an image"
    if text.startswith((b"{", b"[")):
        return "a JSON file, not an image"
    if text[:2] in (b"p1", b"p2", b"p3", b"p4", b"p5", b"p6", b"p7", b"pf"):  # PNM images begin with letters
        return None
    try:
        letters = start.decode("utf-8", errors="strict" if len(start) < 2048 else "ignore")
    except UnicodeDecodeError:
        return None
    if letters.isprintable() or all(c.isprintable() or c in "\t\r\n" for c in letters):
        return f"a text file, not an image: it begins with {letters.strip()[:30]!r}"
    return None


def _one_line(error: Exception, path: str) -> str:
    """The error's first line with its class, without the file's path or names of objects in memory."""
    text = (str(error).strip().splitlines() or [""])[0].replace(path, "").strip()
    text = text.partition(" <_io.")[0] if "<_io." in text else text
    return text or type(error).__name__
