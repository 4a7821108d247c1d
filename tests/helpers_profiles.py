"""Colour profiles for tests, made from numbers: of a display by its primaries, and of grey, with one gamma."""

import struct
from collections.abc import Sequence

import numpy as np
from PIL import ImageCms

# X, Y and Z of red, green and blue, under the light of profiles, D50.
P3 = np.array([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]])
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])
GAMMA = 2.2


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def p3_profile() -> bytes:
    colours = {name: _xyz(own) for name, own in zip((b"rXYZ", b"gXYZ", b"bXYZ"), P3, strict=True)}
    return _profile(b"RGB ", colours | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve()))


def grey_profile() -> bytes:
    return _profile(b"GRAY", {b"kTRC": _curve()})


def p3_as_srgb(colour: Sequence[int]) -> list[int]:
    """Returns the levels of sRGB that show a colour of `p3_profile`."""
    light = (np.array(colour) / 255) ** GAMMA @ P3 @ np.linalg.inv(SRGB)
    light = light.clip(0, 1)
    return (np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255).round().tolist()


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def _curve() -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(GAMMA * 256), 0)


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Returns a profile of a display. Source: ICC.1:2001-04, sections 6.1 (header) and 6.2 (tags)."""
    tags = {b"wtpt": _xyz((0.9642, 1.0, 0.8249)), **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s12s4s", start + len(body), b"", 0x02400000, b"mntr", space, b"XYZ ", b"", b"acsp")
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body
