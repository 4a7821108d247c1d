"""The orientation of stored pictures, from their display matrix."""

import struct
from pathlib import Path

import numpy as np

from mochi_tune.errors import DataError


def read_orientation(path: Path, frame) -> tuple[int, bool]:
    """Returns the degrees counter-clockwise that turn the stored picture upright, and whether it is mirrored.

    Raises:
        DataError: the rotation is not a multiple of 90 degrees.
    """
    matrix = read_matrix(frame)
    if matrix is None:
        return 0, False
    a, b, c, d = matrix
    if min(max(abs(a), abs(d)), max(abs(b), abs(c))) > 0.01 * max(map(abs, matrix)):
        raise DataError(f"{path}: is rotated by {frame.rotation} degrees, not a multiple of 90: re-encode it upright.")
    return round(frame.rotation / 90) * 90 % 360, a * d < b * c


def read_matrix(frame) -> tuple[int, int, int, int] | None:
    """Returns a, b, c, d of a frame's display matrix: the stored (x, y) is shown at (a x + c y, b x + d y)."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix))[:5]
    return a, b, c, d


def turn_upright(image: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """Rotates a stored picture (H, W, 3) by multiples of 90 degrees and mirrors it, by its display matrix."""
    if matrix is None:
        return image
    a, b, c, d = matrix
    if abs(b) > abs(a):
        # x' = c y, y' = b x
        image, a, d = image.transpose(1, 0, 2), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
