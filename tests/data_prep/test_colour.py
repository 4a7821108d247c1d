"""Compares colours with the formulas of the standards in double precision."""

import numpy as np
import pytest
import torch
from helpers_video import copy_from_keyframe, write_planes, write_video
from PIL import Image

from mochi_tune.data_prep.clips import Cut, decode_clip
from mochi_tune.data_prep.colour import tone_map
from mochi_tune.data_prep.probe import scan_video
from mochi_tune.errors import DataError

# Luma's shares of red and blue. Source: ITU-T H.273, table 4.
SHARES = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087),
          9: (0.2627, 0.0593)}  # fmt: skip


def smooth_planes(pixel_format: str, height: int, width: int) -> list[np.ndarray]:
    """Returns planes of slow waves whose colours stay within the range of RGB."""
    bits = 10 if "10" in pixel_format else 8
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [
        0.5 + 0.3 * np.sin(7 * x + 3 * y),
        0.5 + 0.12 * np.cos(5 * y - 2 * x),
        0.5 + 0.12 * np.sin(4 * x * y + 1),
    ]
    columns, rows = (2 if "420" in pixel_format or "422" in pixel_format else 1), (2 if "420" in pixel_format else 1)
    # Chroma is sited between the samples of its block, which hardly matters for slow waves.
    waves[1:] = [wave[rows // 2 :: rows, columns // 2 :: columns] for wave in waves[1:]]
    return [np.rint(wave * (2**bits - 1)).astype(np.uint16 if bits > 8 else np.uint8) for wave in waves]


def to_rgb(planes: list[np.ndarray], bits: int, matrix: int, is_full: bool) -> np.ndarray:
    """Returns RGB in 0..255. Source: ITU-T H.273, section 8.3, equations of MatrixCoefficients."""
    luma = planes[0].astype(float)
    blue, red = (
        np.repeat(np.repeat(plane, luma.shape[0] // plane.shape[0], 0), luma.shape[1] // plane.shape[1], 1).astype(
            float
        )
        for plane in planes[1:]
    )
    unit = 2 ** (bits - 8)
    if is_full:
        luma, blue, red = luma / (256 * unit - 1), *((c - 128 * unit) / (256 * unit - 1) for c in (blue, red))
    else:
        luma, blue, red = (luma - 16 * unit) / (219 * unit), *((c - 128 * unit) / (224 * unit) for c in (blue, red))
    kr, kb = SHARES[matrix]
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    return np.stack([r, (luma - kr * r - kb * b) / (1 - kr - kb), b], -1).clip(0, 1) * 255


def assert_near(path, expected, limit=3.0):
    height, width = expected.shape[:2]
    frame = decode_clip(path, Cut(1, height, width)).frames[0].numpy()
    assert float(np.abs(frame - expected).max()) <= limit


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le"])
@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("matrix", [1, 5, 6, 7, 9])
def test_tagged_video_is_converted_by_its_tags(tmp_path, pixel_format, matrix, is_full):
    planes = smooth_planes(pixel_format, 96, 128)
    path = write_planes(tmp_path / "a.mkv", pixel_format, planes, colorspace=matrix, color_range=2 if is_full else 1)
    assert "assumed" not in scan_video(path).color_matrix
    assert_near(path, to_rgb(planes, 10 if "10" in pixel_format else 8, matrix, is_full))


@pytest.mark.parametrize(
    ("height", "matrix", "name"),
    [(576, 5, "BT.601 (assumed)"), (718, 5, "BT.601 (assumed)"), (720, 1, "BT.709 (assumed)")],
)
def test_untagged_video_is_read_by_its_lines(tmp_path, height, matrix, name):
    planes = smooth_planes("yuv420p", height, 320)
    path = write_planes(tmp_path / "a.mkv", "yuv420p", planes)
    assert scan_video(path).color_matrix == name
    assert decode_clip(path, Cut(1, height, 320)).report["color_matrix"] == name
    assert_near(path, to_rgb(planes, 8, matrix, False))
    wrong = to_rgb(planes, 8, 6 - matrix, False)
    assert np.abs(wrong - to_rgb(planes, 8, matrix, False)).max() > 10


def test_a_matrix_that_is_not_known_is_refused(tmp_path):
    path = write_planes(tmp_path / "a.mkv", "yuv444p", smooth_planes("yuv444p", 64, 64), colorspace=8)
    with pytest.raises(DataError, match="has the colour matrix 8 of ITU-T"):
        scan_video(path)


@pytest.mark.parametrize(("codec", "suffix"), [("libx265", ".mkv"), ("libx265", ".mp4"), ("libvpx-vp9", ".mkv")])
def test_tags_that_only_the_header_has_are_read(tmp_path, codec, suffix):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    plain = write_video(tmp_path / "plain.mkv", 7, codec=codec, options=options)
    path = tmp_path / f"tagged{suffix}"
    copy_from_keyframe(plain, path, 0, colorspace=9, color_primaries=9, color_trc=16, color_range=2)
    assert (scan_video(plain).hdr, scan_video(plain).colour_rules) == ("", 1)
    scan = scan_video(path)
    assert (scan.hdr, scan.color_matrix, scan.colour_rules) == ("PQ (SMPTE ST 2084)", "BT.2020", 2)
    copy_from_keyframe(plain, path, 0, colorspace=1, color_primaries=1, color_trc=1, color_range=2)
    assert scan_video(path).color_matrix == "BT.709"
    # Black of limited range is 16 in full range.
    assert [int(decode_clip(each, Cut(1, 64, 64)).frames[0, 8, 8, 0]) // 8 for each in (plain, path)] == [0, 2]


@pytest.mark.parametrize(("pixel_format", "bits"), [("gray", 8), ("gray10le", 10), ("gray16le", 16)])
def test_grey_of_limited_range_is_expanded(tmp_path, pixel_format, bits):
    kind = np.uint8 if bits == 8 else np.uint16
    codes = np.tile(np.array([16, 125, 235], kind), (16, 16)) * kind(2 ** (bits - 8))
    path = write_planes(tmp_path / "a.mkv", pixel_format, [codes], color_range=1)
    expected = np.tile(np.array([0, (125 - 16) / 219 * 255, 255]), (16, 16))
    assert_near(path, np.stack([expected] * 3, -1), limit=1.2)
    assert scan_video(path).colour_rules == 2
    full = write_planes(tmp_path / "full.mkv", pixel_format, [codes], color_range=2)
    assert_near(full, np.stack([codes / (2**bits - 1) * 255] * 3, -1), limit=1.0)
    assert scan_video(full).colour_rules == 1


# HDR


def pq_signal(light: np.ndarray) -> np.ndarray:
    """Returns PQ of light in cd/m2. Source: SMPTE ST 2084, equation 5.2."""
    power = (np.asarray(light, float) / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg_signal(light: np.ndarray) -> np.ndarray:
    """Returns HLG of grey light in cd/m2 on a display of 1000. Source: ARIB STD-B67, and gamma 1.2 of BT.2100."""
    scene = (np.asarray(light, float) / 1000) ** (1 / 1.2)
    return np.where(
        scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(12 * scene - 0.28466892 + 1e-12) + 0.55991073
    )


@pytest.mark.parametrize(("name", "signal"), [("PQ", pq_signal), ("HLG", hlg_signal)])
def test_grey_keeps_its_light_up_to_the_knee_and_is_compressed_above(name, signal):
    light = np.array([0, 1, 5, 20, 50, 80, 90, 203, 400, 800, 1000])
    codes = np.rint(np.clip(signal(light), 0, 1) * 65535).astype(np.uint16)
    grey = tone_map(np.repeat(codes[None, :, None], 3, 2), name)[0]
    assert np.ptp(grey.astype(int), axis=-1).max() <= 1
    values = grey[:, 0].astype(float)
    # Shown on a display whose white is 203 cd/m2 and whose gamma is 2.4.
    shown = 203 * (values / 255) ** 2.4
    assert np.abs(shown[:7] - light[:7]).max() <= 1.5
    assert (np.diff(values[:-1]) > 0).all() and values[-1] >= 254 and 200 < values[7] < 240


def test_bt2020_colours_become_bt709(tmp_path):
    # A BT.709 red of 50 cd/m2 in BT.2020. Source: ITU-R BT.2087-0, section 2.
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    colour = np.array([50.0, 10.0, 5.0])
    coded = np.rint(pq_signal(to_2020 @ colour) * 65535).astype(np.uint16)[None, None]
    shown = 203 * (tone_map(coded, "PQ")[0, 0] / 255) ** 2.4
    assert np.abs(shown - colour).max() < 1


@pytest.mark.parametrize(("transfer", "name", "signal"), [(16, "PQ", pq_signal), (18, "HLG", hlg_signal)])
def test_an_hdr_clip_is_refused_or_tone_mapped(tmp_path, transfer, name, signal):
    luma = np.rint(64 + 876 * np.tile(signal(np.full(64, 80.0)), (64, 1))).astype(np.uint16)
    planes = [luma, np.full((32, 32), 512, np.uint16), np.full((32, 32), 512, np.uint16)]
    path = write_planes(tmp_path / "a.mkv", "yuv420p10le", planes, colorspace=9, color_trc=transfer, color_primaries=9)
    assert scan_video(path).hdr.startswith(name)
    with pytest.raises(DataError, match=f"is HDR, {name} .*data.hdr=tonemap"):
        decode_clip(path, Cut(1, 64, 64))
    clip = decode_clip(path, Cut(1, 64, 64, hdr="tonemap"))
    expected = 255 * (80 / 203) ** (1 / 2.4)
    assert (clip.frames.float() - expected).abs().max() <= 3 and clip.report["hdr"].startswith(name)
    assert clip.report["color_matrix"] == "BT.2020"
    untagged = write_planes(tmp_path / "b.mkv", "yuv420p10le", planes, color_trc=transfer)
    assert scan_video(untagged).color_matrix == "BT.2020 (assumed)"


# Stills


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tif", ".jpg"])
def test_stills_are_clips_of_one_frame(tmp_path, suffix):
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:, :48], picture[:, 48:] = (200, 30, 30), (30, 30, 200)
    options = {"lossless": True} if suffix == ".webp" else {"quality": 95, "subsampling": 0} if suffix == ".jpg" else {}
    Image.fromarray(picture).save(tmp_path / f"a{suffix}", **options)
    scan = scan_video(tmp_path / f"a{suffix}")
    assert (scan.width, scan.height, scan.num_frames, scan.is_still) == (96, 64, 1, True)
    clip = decode_clip(tmp_path / f"a{suffix}", Cut(1, 64, 96))
    assert (clip.frames[0].int() - torch.from_numpy(picture).int()).abs().max() <= (3 if suffix == ".jpg" else 0)
    with pytest.raises(DataError, match="has 1 frames at 30 fps, needs 7"):
        decode_clip(tmp_path / f"a{suffix}", Cut(7, 64, 96))


def test_a_still_is_turned_by_its_exif_and_its_transparency_and_16_bits_are_shown(tmp_path):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :32] = 250
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    assert (scan_video(tmp_path / "turned.png").width, scan_video(tmp_path / "turned.png").height) == (32, 64)
    frame = decode_clip(tmp_path / "turned.png", Cut(1, 64, 32)).frames[0]
    # Orientation 6 turns clockwise: what is left comes to the top.
    assert (frame[:32] == 250).all() and (frame[32:] == 0).all()
    Image.fromarray(np.full((32, 32, 4), (9, 9, 9, 0), np.uint8)).save(tmp_path / "clear.png")
    assert (decode_clip(tmp_path / "clear.png", Cut(1, 32, 32)).frames == 255).all()
    Image.fromarray(np.full((32, 32), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert (decode_clip(tmp_path / "deep.png", Cut(1, 32, 32)).frames == 0x80).all()


def test_an_animated_webp_is_a_video(tmp_path):
    pictures = [Image.fromarray(np.full((32, 32, 3), 40 * n, np.uint8)) for n in range(4)]
    durations = [100, 50, 100, 200]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=durations, lossless=True)
    scan = scan_video(tmp_path / "a.webp")
    assert (scan.num_source_frames, scan.num_frames, scan.is_still) == (4, 14, False)
    frames = decode_clip(tmp_path / "a.webp", Cut(14, 32, 32)).frames
    # The third one begins at 4.5 frames, which counts as 5.
    assert (frames[:, 0, 0, 0] // 40).tolist() == [0] * 3 + [1] * 2 + [2] * 3 + [3] * 6


def test_a_damaged_still_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.png: cannot be read as a picture"):
        scan_video(tmp_path / "a.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "b.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:1500])
    with pytest.raises(DataError, match=r"b\.jpg: cannot be read as a picture"):
        decode_clip(tmp_path / "b.jpg", Cut(1, 64, 64))
