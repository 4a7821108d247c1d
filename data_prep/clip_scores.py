"""Measures a clip: black and frozen pictures, motion, sharpness, borders, and perceptual hashes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mochi_tune.data_prep.frames import image_matrix, read_pictures
from mochi_tune.data_prep.orientation import turn_upright
from mochi_tune.data_prep.probe import VideoIndex, read_index

# Increase it when the same clip would get other scores.
SCORES_VERSION = 2
# A pixel darker than this, of 255, is black; a picture or a line is black when nearly all of its pixels are.
# Source: FFmpeg n7.1 libavfilter/vf_blackdetect.c, pixel_black_th 0.10 and picture_black_ratio_th 0.98.
_DARK, _DARK_SHARE = 25.5, 0.98
# Maximum standard deviation of a line in a border, of 255.
_FLAT = 6
# Neighbouring pictures are compared in blocks at this size: pixels of the longer side, and of a block's side.
_SMALL, _BLOCK = 256, 8
# Maximum difference of a block, of 255, between equal pictures; compression changes a still picture by less.
_SAME = 2.0
# Interval between the pictures whose difference is the motion, at any frame rate.
_MOTION_SECONDS = Fraction(1, 10)
# Number of sampled pictures, and pixels of their shorter side when sharpness is measured, the model's height.
NUM_SAMPLES, _SHARPNESS_PIXELS = 8, 480
# Side of the picture that is hashed, and of the part of its spectrum that becomes the hash.
_HASH_PICTURE, _HASH_SIDE = 32, 8
# Minimum contrast (standard deviation, of 255) of a picture that is hashed; with less, the hash would be noise.
_MIN_CONTRAST = 4.0
# Maximum hashes of a timeline, _MOTION_SECONDS apart, and the placeholder for a picture without contrast.
_MAX_TIMELINE, NO_HASH = 300, "-" * 16
_FULL_RANGE = 2


@dataclass(frozen=True)
class Scores:
    """The scores of a clip.

    Attributes:
        width: of the upright picture, in square pixels.
        height: of the upright picture, in square pixels.
        frames: number of pictures.
        seconds: length of the clip.
        black: share of black pictures, 0 to 1.
        frozen: the longest run of equal pictures that are not black, as a share of the clip, 0 to 1.
        motion: mean difference of pictures 0.1 s apart, in grey levels of 255.
        sharpness: variance of the Laplacian of the luma (0 to 255) at 480 pixels of the shorter side, the median of
            eight pictures; 0 if all are black.
        left: width of the black border of the upright picture, in pixels.
        top: as `left`.
        right: as `left`.
        bottom: as `left`.
        hashes: 16 hex digits for each of eight pictures; "" for one without contrast.
        timeline: 16 hex digits, or NO_HASH, for each picture 0.1 s apart in the first 30 s.
    """

    width: int
    height: int
    frames: int
    seconds: float
    black: float
    frozen: float
    motion: float
    sharpness: float
    left: int
    top: int
    right: int
    bottom: int
    hashes: tuple[str, ...]
    timeline: str = ""

    @property
    def border(self) -> int:
        """The widest border, in pixels."""
        return max(self.left, self.top, self.right, self.bottom)


def measure_clip(path: Path) -> Iterator[dict[str, Any]]:
    """Decodes a clip and measures it; runs in a child process.

    Yields:
        {} regularly, to show progress, and finally the values of `Scores`.

    Raises:
        DataError: the clip cannot be read.
    """
    video = read_index(path)
    count = len(video.ticks)
    wanted = {(2 * i + 1) * count // (2 * NUM_SAMPLES) for i in range(NUM_SAMPLES)}
    pictures, neighbours = _Pictures(), _Neighbours()
    for number, picture in enumerate(read_pictures(path, video)):
        image, matrix = picture.image, image_matrix(picture)
        neighbours.add(_grey(image, _SMALL, is_longer=True), picture.time)
        if number in wanted:
            pictures.add(
                turn_upright(_grey(image)[..., None], matrix)[..., 0],
                turn_upright(_grey(image, _SHARPNESS_PIXELS, is_longer=False)[..., None], matrix)[..., 0],
            )
        if number % 20 == 0:
            yield {}
    yield {**_described(video), **neighbours.scores(), **pictures.scores(video)}


def _described(video: VideoIndex) -> dict[str, Any]:
    scan = video.scan
    return {
        "width": scan.width,
        "height": scan.height,
        "frames": scan.num_source_frames,
        "seconds": round(scan.source_seconds, 3),
    }


def _grey(image: Any, pixels: int | None = None, is_longer: bool = True) -> np.ndarray:
    """Returns the luma of a stored picture, uint8 (H, W), with its longer or shorter side reduced to `pixels`."""
    side = max(image.width, image.height) if is_longer else min(image.width, image.height)
    scale = min(pixels / side, 1) if pixels else 1
    width, height = (max(round(each * scale), 1) for each in (image.width, image.height))
    return image.reformat(width=width, height=height, format="gray", dst_color_range=_FULL_RANGE).to_ndarray()


def is_black(grey: np.ndarray) -> bool:
    """Whether nearly all pixels of a luma picture are black."""
    return float((grey < _DARK).mean()) >= _DARK_SHARE


class _Neighbours:
    """Compares each picture with the previous one, and with one _MOTION_SECONDS earlier."""

    def __init__(self) -> None:
        self.num_pictures = self.num_black = self.run = self.longest = 0
        self.last: np.ndarray | None = None
        self.compared: tuple[np.ndarray, Fraction] | None = None
        self.differences: list[float] = []
        self.timeline: list[str] = []

    def add(self, grey: np.ndarray, time: Fraction) -> None:
        self.num_pictures += 1
        is_dark = is_black(grey)
        self.num_black += is_dark
        same = self.last is not None and self.last.shape == grey.shape and largest_change(self.last, grey) <= _SAME
        # Black pictures have their own score.
        same = same and not is_dark
        self.run = self.run + 1 if same else 0
        self.longest = max(self.longest, self.run)
        self.last = grey
        if self.compared is None or self.compared[0].shape != grey.shape:
            self.compare_from(grey, time)
        elif time - self.compared[1] >= _MOTION_SECONDS - Fraction(1, 1000):
            self.differences.append(float(np.abs(grey.astype(np.int16) - self.compared[0]).mean()))
            self.compare_from(grey, time)

    def compare_from(self, grey: np.ndarray, time: Fraction) -> None:
        self.compared = grey, time
        if len(self.timeline) < _MAX_TIMELINE:
            self.timeline.append(hash_picture(grey) or NO_HASH)

    def scores(self) -> dict[str, Any]:
        pairs = max(self.num_pictures - 1, 1)
        motion = float(np.mean(self.differences)) if self.differences else 0.0
        return {
            "black": round(self.num_black / max(self.num_pictures, 1), 4),
            "frozen": round(self.longest / pairs, 4),
            "motion": round(motion, 3),
            "timeline": "".join(self.timeline),
        }


def largest_change(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the mean difference, of 255, in the block of 8x8 pixels that differs most."""
    height, width = (max(side - side % _BLOCK, 1) for side in one.shape)
    change = np.abs(one.astype(np.int16) - other)[:height, :width]
    if min(height, width) < _BLOCK:
        return float(change.mean())
    return float(change.reshape(height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK).mean((1, 3)).max())


class _Pictures:
    """Measures the borders, the sharpness and the hashes of sampled pictures."""

    def __init__(self) -> None:
        self.whole: list[np.ndarray] = []
        self.scaled: list[np.ndarray] = []

    def add(self, whole: np.ndarray, scaled: np.ndarray) -> None:
        # A black picture has no border, no sharpness and no hash.
        if not is_black(whole) and all(each.shape == whole.shape for each in self.whole):
            self.whole.append(whole)
            self.scaled.append(scaled)

    def scores(self, video: VideoIndex) -> dict[str, Any]:
        if not self.whole:
            return {"sharpness": 0.0, "left": 0, "top": 0, "right": 0, "bottom": 0, "hashes": []}
        top, bottom = count_border(self.whole, 0)
        left, right = count_border(self.whole, 1)
        rows, columns = self.whole[0].shape
        hashes, sharpness = [], []
        for scaled in self.scaled:
            # Without the borders, which have sharp edges and no content.
            y, x = scaled.shape[0] / rows, scaled.shape[1] / columns
            inner = scaled[
                -int(-top * y // 1) : scaled.shape[0] - -int(-bottom * y // 1),
                -int(-left * x // 1) : scaled.shape[1] - -int(-right * x // 1),
            ]
            sharpness.append(laplacian_variance(inner))
            hashes.append(hash_picture(inner))
        wide, high = video.scan.width / columns, video.scan.height / rows
        return {
            "sharpness": round(float(np.median(sharpness)), 2),
            "left": round(left * wide),
            "top": round(top * high),
            "right": round(right * wide),
            "bottom": round(bottom * high),
            "hashes": hashes,
        }


def count_border(pictures: Sequence[np.ndarray], axis: int) -> tuple[int, int]:
    """Counts the lines at both ends that are black and flat in all pictures.

    Args:
        pictures: uint8 luma (H, W) of equal shape, at least one.
        axis: 0 counts rows from the top and the bottom, 1 columns from the left and the right.
    """
    is_bar = None
    for picture in pictures:
        along = 1 - axis
        is_dark = (picture < _DARK).mean(along) >= _DARK_SHARE
        is_flat = picture.std(along) <= _FLAT
        is_bar = is_dark & is_flat if is_bar is None else is_bar & is_dark & is_flat
    assert is_bar is not None
    inside = np.flatnonzero(~is_bar)
    # An entirely dark picture has no border.
    return (int(inside[0]), int(len(is_bar) - 1 - inside[-1])) if len(inside) else (0, 0)


def laplacian_variance(grey: np.ndarray) -> float:
    """Returns the variance of the four-neighbour Laplacian of uint8 luma (H, W); 0 if it is smaller than 3x3."""
    if min(grey.shape) < 3:
        return 0.0
    x = grey.astype(np.float32)
    laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
    return float(laplacian.var())


def hash_picture(grey: np.ndarray) -> str:
    """Returns a perceptual hash of uint8 luma (H, W): which of its 64 lowest frequencies are above their median.

    Source: N. Krawetz, "Looks Like It" (2011), hackerfactor.com, the hash that is called pHash there.

    Returns:
        16 hex digits; "" for a picture without contrast.
    """
    from PIL import Image

    if min(grey.shape) < 2 or grey.std() < _MIN_CONTRAST:
        return ""
    image = Image.fromarray(np.ascontiguousarray(grey)).resize((_HASH_PICTURE, _HASH_PICTURE), Image.Resampling.BOX)
    numbers = np.arange(_HASH_PICTURE)
    basis = np.cos(np.pi / _HASH_PICTURE * (numbers + 0.5) * np.arange(_HASH_SIDE + 1)[:, None])
    spectrum = (basis @ np.asarray(image, np.float64) @ basis.T)[1:, 1:]
    bits = spectrum.ravel() > np.median(spectrum)
    return np.packbits(bits).tobytes().hex()
