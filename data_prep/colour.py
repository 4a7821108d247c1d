"""Converts decoded pictures to 8-bit RGB by their tagged matrix and range; tone-maps HDR."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mochi_tune.errors import DataError

# The matrices of ITU-T H.273, table 4, that the conversion supports, by number.
MATRICES = {1: "BT.709", 4: "FCC", 5: "BT.601", 6: "BT.601", 7: "SMPTE 240M", 9: "BT.2020"}
_UNSPECIFIED = (0, 2, 3)
# Transfer characteristics of the same standard that need tone mapping to SDR.
HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
# Players treat untagged video with at least this many lines as HD.
_HD_LINES = 720
FULL_RANGE, LIMITED_RANGE = 2, 1
# FFmpeg's formats of grey pictures, the second with transparency.
_GREYS = ("gray", "ya")
# Attributes of PyAV's frames and codecs.
_TAGS = ("colorspace", "color_primaries", "color_trc", "color_range")
# Flags of libswscale.
_BICUBIC, _ACCURATE_RND, _FULL_CHR_H_INT = 0x4, 0x40000, 0x2000
# Light in cd/m2: HDR reference white (diffuse white), and the assumed peak of HDR.
# Source: ITU-R BT.2408-7, section 2.1, and BT.2100-2, table 5.
_REFERENCE_WHITE, _PEAK = 203.0, 1000.0
# Linear BT.2020 to linear BT.709. Source: ITU-R BT.2407-0, section 2.
_BT2020_TO_BT709 = ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187))
# PQ. Source: ITU-R BT.2100-2, table 4.
_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def read_header_colours(stream) -> dict[str, int]:
    """Returns the colour tags in the header of a container; call it before the first picture is decoded.

    The decoders of HEVC and VP9 replace them by the tags of the pictures, even if these have none.
    """
    return {name: getattr(stream.codec_context, name) for name in _TAGS}


def fill_colours(frame, header: dict[str, int]) -> bool:
    """Sets the tags that a decoded picture lacks to those of the container's header.

    Returns:
        Whether that may change its colours.
    """
    # These decoders take a picture without tags as limited range; then the header decides.
    is_tagged = frame.colorspace not in _UNSPECIFIED
    before = [getattr(frame, name) for name in _TAGS]
    for name, found in zip(_TAGS, before, strict=True):
        if name == "color_range":
            is_missing, is_known = not found or not is_tagged, header[name] in (FULL_RANGE, LIMITED_RANGE)
        else:
            is_missing, is_known = found in _UNSPECIFIED, header[name] not in _UNSPECIFIED
        # RGB has no matrix, and its range is full.
        is_used = not frame.format.is_rgb or name in ("color_primaries", "color_trc")
        if is_missing and is_known and is_used:
            setattr(frame, name, header[name])
    return before != [getattr(frame, name) for name in _TAGS]


def find_matrix(path: Path, frame) -> tuple[int, bool]:
    """Returns the number of a YUV frame's matrix, and whether it is only assumed.

    Raises:
        DataError: the conversion does not support the matrix.
    """
    number = frame.colorspace
    if number in MATRICES:
        return number, False
    if number in _UNSPECIFIED:
        if frame.color_trc in HDR_TRANSFERS:
            return 9, True
        return (1 if frame.height >= _HD_LINES else 5), True
    raise DataError(
        f"{path}: has the colour matrix {number} of ITU-T H.273, which is not supported: convert it to BT.709 first."
    )


def describe_matrix(path: Path, frame) -> str:
    """Returns the name of the matrix; "RGB" if there is none.

    Raises:
        DataError: as `find_matrix`.
    """
    if is_rgb(frame):
        return "RGB"
    number, is_assumed = find_matrix(path, frame)
    return MATRICES[number] + (" (assumed)" if is_assumed else "")


def is_rgb(frame) -> bool:
    """Whether a decoded picture is stored as RGB or grey, without a matrix."""
    return frame.format.is_rgb or frame.format.name.startswith(("pal8", "mono", *_GREYS))


def is_limited_grey(frame) -> bool:
    """Whether a decoded picture is grey in limited range, which libswscale takes for full range."""
    return frame.format.name.startswith(_GREYS) and frame.color_range == LIMITED_RANGE


class RgbConverter:
    """Converts the decoded pictures of one video to RGB.

    Args:
        path: for messages.
        hdr: name of the transfer function to tone-map from; "" for SDR.
    """

    def __init__(self, path: Path, hdr: str) -> None:
        from av.video.reformatter import VideoReformatter

        self.path = path
        self.hdr = hdr
        self.reformatter = VideoReformatter()

    def convert(self, frame) -> np.ndarray:
        """Returns uint8 RGB (H, W, 3) in the stored orientation."""
        if not self.hdr:
            return self._convert(frame, "rgb24")
        return tone_map(self._convert(frame, "rgb48le"), self.hdr)

    def _convert(self, frame, layout: str) -> np.ndarray:
        options: dict[str, Any] = {}
        if not is_rgb(frame):
            matrix, _ = find_matrix(self.path, frame)
            is_full = frame.color_range == FULL_RANGE or frame.format.name.startswith("yuvj")
            options = {
                "src_colorspace": matrix,
                "dst_colorspace": matrix,
                "src_color_range": FULL_RANGE if is_full else LIMITED_RANGE,
                "dst_color_range": FULL_RANGE,
            }
        # FFmpeg's default is fast and exact to 2 of 255 at 8 bits; at more bits it is off by 5.
        flags = _BICUBIC if frame.format.components[0].bits <= 8 else _BICUBIC | _ACCURATE_RND | _FULL_CHR_H_INT
        colours = self.reformatter.reformat(frame, format=layout, interpolation=flags, **options).to_ndarray()
        return _expand(colours, frame.format.components[0].bits) if is_limited_grey(frame) else colours


def _expand(colours: np.ndarray, bits: int) -> np.ndarray:
    """Expands limited range to full range. Source: ITU-T H.273, section 8.3, equations of luma.

    Args:
        colours: uint8 or uint16, converted from codes of `bits` bits as if these were of full range.
        bits: of the codes.
    """
    top = np.iinfo(colours.dtype).max
    codes = colours.astype(np.float32) / top * ((2**bits - 1) / 2 ** (bits - 8))
    return np.rint((codes - 16) / 219 * top).clip(0, top).astype(colours.dtype)


def tone_map(coded: np.ndarray, hdr: str) -> np.ndarray:
    """Tone-maps uint16 BT.2020 HDR (H, W, 3) to uint8 BT.709 (H, W, 3).

    Light up to half of the reference white is kept. Brighter light is compressed by the curve of BT.2390, computed for
    the brightest of the three colours, so that hues are kept.
    """
    light = _light_of_codes(hdr.startswith("PQ"))[coded]
    if not hdr.startswith("PQ"):
        # HLG's system gamma. Source: ITU-R BT.2100-2, table 5, OOTF with gamma 1.2 at 1000 cd/m2.
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= (_PEAK * np.maximum(luminance, 1e-9) ** 0.2)[..., None]
    light = np.maximum(light @ np.array(_BT2020_TO_BT709, np.float32).T, 0)
    brightest = np.maximum(light.max(-1), 1e-6)
    light *= (_compress(brightest) / brightest)[..., None]
    # The inverse of the display's curve. Source: ITU-R BT.1886, annex 1, with black 0.
    signal = np.clip(light / _REFERENCE_WHITE, 0, 1) ** np.float32(1 / 2.4)
    return np.rint(signal * 255).astype(np.uint8)


@cache
def _light_of_codes(is_pq: bool) -> np.ndarray:
    """Returns the light of each 16-bit code: in cd/m2 for PQ, scene light in 0..1 for HLG."""
    signal = np.arange(65536) / 65535
    if is_pq:
        # Source: ITU-R BT.2100-2, table 4, EOTF.
        power = signal ** (1 / _M2)
        light = 10000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)
    else:
        # Source: ITU-R BT.2100-2, table 5, the inverse of the OETF.
        a = 0.17883277
        b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return light.astype(np.float32)


def _pq(light: np.ndarray | float) -> np.ndarray:
    """Returns the PQ signal of light in cd/m2. Source: ITU-R BT.2100-2, table 4, inverse EOTF."""
    power = (np.asarray(light, np.float32) / 10000) ** np.float32(_M1)
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** np.float32(_M2)


def _compress(light: np.ndarray) -> np.ndarray:
    """Maps light from [0, _PEAK] to [0, _REFERENCE_WHITE], in cd/m2. Source: ITU-R BT.2390-11, section 5.4.1."""
    e = np.minimum(_pq(light) / _pq(_PEAK), 1)
    top = _pq(_REFERENCE_WHITE) / _pq(_PEAK)
    knee = 1.5 * top - 0.5
    t = np.maximum(e - knee, 0) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    signal = np.where(e < knee, e, spline) * _pq(_PEAK)
    power = signal ** (1 / _M2)
    return 10000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)
