"""Stills with a colour profile other than sRGB."""

from pathlib import Path

import numpy as np
import pytest
from helpers_prepare import config_for
from helpers_profiles import grey_profile, p3_as_srgb, p3_profile, srgb_profile
from PIL import Image

from mochi_tune.data_prep import gather, stills
from mochi_tune.data_prep.clips import Cut, decode_clip
from mochi_tune.data_prep.prepare import prepare
from mochi_tune.data_prep.probe import scan_video

COLOUR = (200, 60, 40)


def decode(path: Path) -> list[int]:
    return decode_clip(path, Cut(1, 32, 48)).frames[0, 16, 24].tolist()


def write(path: Path, picture: Image.Image, profile: bytes, **options) -> Path:
    picture.save(path, icc_profile=profile, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_a_still_of_display_p3_is_shown_in_srgb(tmp_path, suffix):
    options = {"lossless": True} if suffix == ".webp" else {"quality": 100} if suffix == ".jpg" else {}
    path = write(tmp_path / f"a{suffix}", Image.new("RGB", (48, 32), COLOUR), p3_profile(), **options)
    expected = p3_as_srgb(COLOUR)
    assert expected[0] > COLOUR[0] + 8
    assert np.abs(np.subtract(decode(path), expected)).max() <= 2
    assert scan_video(path).has_profile


def test_a_turned_one_and_one_with_alpha_or_a_palette_are_too(tmp_path):
    expected = p3_as_srgb(COLOUR)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = write(tmp_path / "turned.png", Image.new("RGB", (32, 48), COLOUR), p3_profile(), exif=exif)
    clear = Image.new("RGBA", (48, 32), (*COLOUR, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 10, 32))
    alpha = write(tmp_path / "alpha.png", clear, p3_profile())
    palette = write(tmp_path / "palette.png", Image.new("RGB", (48, 32), COLOUR).quantize(4), p3_profile())
    for path in (turned, alpha, palette):
        assert np.abs(np.subtract(decode(path), expected)).max() <= 2, path
    assert decode_clip(alpha, Cut(1, 32, 48)).frames[0, 16, 2].tolist() == [255, 255, 255]
    grey = write(tmp_path / "grey.png", Image.new("L", (48, 32), 20), grey_profile())
    # Gamma 2.2 has darker shadows than sRGB.
    light = (20 / 255) ** 2.2
    level = 255 * (1.055 * light ** (1 / 2.4) - 0.055 if light > 0.0031308 else 12.92 * light)
    assert np.abs(np.subtract(decode(grey), level)).max() <= 1 and scan_video(grey).has_profile


def test_srgb_and_a_profile_that_does_not_fit_or_is_damaged_leave_a_still_as_it_is(tmp_path):
    colours, grey = Image.new("RGB", (48, 32), COLOUR), Image.new("L", (48, 32), 20)
    for name, picture, profile in (
        ("plain", colours, b""),
        ("srgb", colours, srgb_profile()),
        ("damaged", colours, p3_profile()[:200]),
        ("no profile", colours, b"hello"),
        ("of grey", colours, grey_profile()),
        ("of colours", grey, p3_profile()),
    ):
        path = write(tmp_path / f"{name}.png", picture, profile)
        assert decode(path) == (list(COLOUR) if picture is colours else [20] * 3), name
        assert not scan_video(path).has_profile, name


def test_only_stills_of_a_profile_are_encoded_again_where_an_older_version_took_them_as_srgb(tmp_path, monkeypatch):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, profile in (("p3", p3_profile()), ("srgb", srgb_profile()), ("plain", b"")):
        write(videos / f"{name}.png", Image.new("RGB", (96, 64), COLOUR), profile)
    config = config_for(tmp_path, buckets=[[1, 32, 48]])
    with monkeypatch.context() as older:
        older.setattr(stills, "_foreign_profile", lambda image: None)
        # Scan in this process: a child would not have the patch.
        older.setattr(gather.ClipDecoder, "scan", lambda self, path: scan_video(path))
        assert prepare(config).clips_encoded == 3
    kept = tmp_path / "cache" / ".scans.json"
    kept.write_text(kept.read_text().replace('"version": 3', '"version": 2'))
    assert '"version": 2' in kept.read_text()
    done = prepare(config)
    assert (done.kept, done.clips_encoded) == (3, 1)
    assert prepare(config).clips_encoded == 0
