"""Arrays in .npy files: written whole, checked before they are mapped into memory."""

from pathlib import Path

import numpy as np

from gns_pretrain.errors import InputError
from gns_pretrain.system.files import sha256_of

HINT = "restore the file or prepare the folder again"
VERIFY_BELOW_BYTES = 2**28  # of a split's files: hashing them takes about a second


def open_array(
    path: Path, *, dtype: np.dtype, shape: tuple[int, ...], sha256: str | None
) -> np.ndarray:
    """Map one .npy file into memory, read-only.

    Existence, dtype, shape and size are always checked, without reading a page.

    Args:
        path: of the file, as its meta.json names it.
        dtype: what meta.json says, as `shape`.
        sha256: of the whole file; None leaves it unchecked.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing, though meta.json names it; {HINT}")
    try:
        found_shape, found, offset = read_npy_header(path)
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise InputError(f"{path} is truncated or not a .npy file ({error}); {HINT}") from error
    if found != dtype or found_shape != shape:
        raise InputError(
            f"{path} holds {found}{list(found_shape)}, but meta.json says {dtype}{list(shape)}; "
            f"{HINT}"
        )
    num_bytes = path.stat().st_size
    expected = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if num_bytes != expected:
        cause = "is truncated" if num_bytes < expected else "is longer than its header says"
        raise InputError(f"{path} {cause}: {num_bytes} bytes, not {expected}; {HINT}")
    if sha256 is not None and sha256_of(path) != sha256:
        raise InputError(f"{path} was altered: its sha256 is not the one in meta.json; {HINT}")
    # A plain view: slicing np.memmap itself costs several microseconds.
    return np.asarray(np.memmap(path, dtype, "r", offset, shape))


def read_npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """Read shape, dtype and the position of the first element; ValueError if there is no header.

    np.load would also open archives and, asked to, pickles, and map what the header claims.
    """
    formats = np.lib.format
    with path.open("rb") as file:
        is_first = formats.read_magic(file) == (1, 0)
        read = formats.read_array_header_1_0 if is_first else formats.read_array_header_2_0
        shape, in_columns, dtype = read(file)
        if in_columns and len(shape) > 1:
            raise ValueError("its elements are in Fortran's order")
        return shape, dtype, file.tell()
