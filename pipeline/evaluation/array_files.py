"""Embeddings and labels in .npy files, as other programs write them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError, joined_lines

_LOOKS_LIKE = (  # first bytes, or ending: what the file is, how to convert it
    (b"PK\x03\x04", ".npz", "a .npz archive of several arrays: save each as np.save('x.npy', archive['NAME'])"),
    (b"PK\x03\x04", "", "a file of torch.save: save it as np.save('x.npy', torch.load(PATH).cpu().numpy())"),
    (b"\x80", "", "a pickle: save the array in it with np.save"),
    (b"PAR1", "", "a Parquet file: save its column with np.save"),
)


def read_array(path: str) -> np.ndarray:
    """The array of a .npy file.

    Raises:
        UserError: It is missing, empty, damaged, of another format, or holds Python objects.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(6)
        if not start:
            raise UserError(f"{path} is empty (0 bytes), expected an array that np.save has written")
        if start != b"\x93NUMPY":
            for magic, ending, what in _LOOKS_LIKE:
                if start.startswith(magic) and path.endswith(ending):
                    raise UserError(f"{path} is {what}")
            raise UserError(f"{path} cannot be read as a .npy array: expected a file that np.save has written")
        return np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path} cannot be read as a .npy array ({error.strerror or error})") from error
    except ValueError as error:
        if "allow_pickle" in str(error) or "Object arrays" in str(error):
            raise UserError(
                f"{path} cannot be read as a .npy array: it holds Python objects (dtype object); save numbers or text, for "
                "example np.save(PATH, array.astype(np.float32)) or array.astype(str)"
            ) from error
        raise UserError(f"{path} cannot be read as a .npy array ({joined_lines(error)})") from error


def read_embeddings(path: str) -> Tensor:
    """Embeddings [N, D] in float32 or float64.

    Raises:
        UserError: As `read_array`; another shape or type.
    """
    array = read_array(path)
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        raise UserError(f"{path} contains {array.dtype} {list(array.shape)}, expected floats [N, D]")
    wide = array.dtype.itemsize >= 8
    return torch.from_numpy(np.ascontiguousarray(array, np.float64 if wide else np.float32))


def read_labels(path: str, num: int, embeddings: str) -> np.ndarray:
    """Labels [N]: whole numbers as int64, or text; a column [N, 1] is taken as [N].

    Raises:
        UserError: As `read_array`; another number, shape or type.
    """
    array = read_array(path)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    expected = "expected one label a row: integers [N] or text [N]"
    if array.ndim != 1 or array.dtype.kind not in "iufbUS":
        raise UserError(f"{path} contains {array.dtype} {list(array.shape)}, {expected}")
    if len(array) != num:
        raise UserError(f"{embeddings} has {num} rows, {path} has {len(array)}")
    if array.dtype.kind == "f":
        bad = np.flatnonzero(~(np.isfinite(array) & (array == np.rint(array))))
        if len(bad):
            raise UserError(
                f"{path} contains {array.dtype} {list(array.shape)}, {expected}; row {bad[0]} is {array[bad[0]]}, no whole number"
            )
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "replace")
    return array if array.dtype.kind == "U" else array.astype(np.int64)


def label_numbers(labels: Sequence[np.ndarray]) -> tuple[list[Tensor], list[str]]:
    """Numbers of the classes on each side, and the classes' names.

    Raises:
        UserError: One side has numbers and the other text.
    """
    if len({array.dtype.kind for array in labels}) > 1:
        raise UserError("the labels of the queries and of the gallery have to be both numbers or both text")
    names, numbers = np.unique(np.concatenate(labels), return_inverse=True)
    cuts = np.cumsum([len(array) for array in labels])[:-1]
    return [torch.from_numpy(part) for part in np.split(numbers.astype(np.int64), cuts)], [str(name) for name in names]
