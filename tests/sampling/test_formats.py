import json
import os
import re
import xml.etree.ElementTree as ElementTree
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mochi_tune.config.sample import SampleConfig
from mochi_tune.errors import ConfigError
from mochi_tune.sampling import formats
from mochi_tune.sampling.formats import CODECS, FORMATS, MP4, PNG, Codec, Encoding, choose_encoding
from mochi_tune.sampling.pictures import durations
from mochi_tune.sampling.video import write_video

CODED = [Encoding(name, codec, CODECS[codec].default_crf) for name, codecs in FORMATS.items() for codec in codecs]
PICTURES = [Encoding("gif", None, None), Encoding("webp", None, None)]
LOSSLESS = [Encoding(name, codec, 0) for name, codec in (("mp4", "h264"), ("mp4", "hevc"), ("webm", "vp9"))]
METADATA = {"title": "käse & <wine>\0", "comment": json.dumps({"prompt": "käse & <wine>", "seed": 3})}


def ids(encoding):
    return f"{encoding.format}-{encoding.codec}-{encoding.crf}"


def flat_frames(count=3, size=64):
    """Returns frames of four flat colours; the upper left one changes in the second frame."""
    frames = torch.empty(count, size, size, 3, dtype=torch.uint8)
    half = size // 2
    for y, x, colour in ((0, 0, (220, 20, 30)), (0, 1, (20, 200, 40)), (1, 0, (30, 40, 210)), (1, 1, (128, 128, 128))):
        frames[:, y * half : (y + 1) * half, x * half : (x + 1) * half] = torch.tensor(colour, dtype=torch.uint8)
    frames[1:2, :half, :half] = torch.tensor((250, 240, 10), dtype=torch.uint8)
    return frames


def real_frames(count=6, height=96, width=160, noise=2.0):
    """Returns frames of moving clouds of all sizes, whose amplitude falls with frequency as in photos, with grain."""
    rng = np.random.default_rng(0)
    large = (height + count, width + 2 * count)
    fy, fx = np.fft.fftfreq(large[0])[:, None], np.fft.rfftfreq(large[1])[None]
    radius = np.maximum(np.hypot(fy, fx), 1 / max(large))
    planes = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal(large)) / radius**1.5, s=large) for _ in range(3)]
    clouds = np.stack([p / p.std() for p in planes], -1) * [40, 35, 30] + [120, 110, 100]
    cut = [clouds[i : i + height, 2 * i : 2 * i + width] for i in range(count)]
    grain = [c + noise * rng.standard_normal((height, width, 1)) for c in cut]
    return torch.from_numpy(np.stack(grain).clip(0, 255).astype(np.uint8))


def shown(frame):
    """Returns the colours (H, W, 3), 0 to 255, that a player shows by the tags, without interpolating chroma samples.

    Source: ITU-R BT.709-6, section 3, for 8 bits.
    """
    assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
    luma, blue, red = (
        np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width].astype(float)
        for plane in frame.planes
    )
    repeat = luma.shape[0] // blue.shape[0]
    blue, red = (plane.repeat(repeat, 0).repeat(repeat, 1) for plane in (blue, red))
    luma, blue, red = (luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    r, b = luma + 1.5748 * red, luma + 1.8556 * blue
    return np.stack([r, (luma - 0.2126 * r - 0.0722 * b) / 0.7152, b], -1) * 255


def decoded(path):
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def read_pictures(path):
    """Returns the frames of an animation as uint8 (F, H, W, 3), and the milliseconds of each."""
    with Image.open(path) as image:
        frames, milliseconds = [], []
        for number in range(image.n_frames):
            image.seek(number)
            frames.append(np.array(image.convert("RGB")))
            milliseconds.append(image.info.get("duration"))
    return np.stack(frames), milliseconds


@pytest.mark.parametrize("encoding", CODED + LOSSLESS, ids=ids)
def test_flat_colours_are_shown_as_they_are(tmp_path, encoding):
    frames = flat_frames()
    path = write_video(tmp_path / f"x.{encoding.format}", frames.split([1, 2]), encoding=encoding)
    back = np.stack([shown(frame) for frame in decoded(path)])
    assert back.shape == frames.shape
    # Away from edges, where subsampled chroma and compression mix colours. A wrong matrix causes errors of at least 20.
    inner = np.r_[8:24, 40:56]
    difference = np.abs(back - frames.numpy())[:, inner][:, :, inner]
    assert difference.max() <= (2 if encoding.crf == 0 else 5)


@pytest.mark.parametrize("encoding", CODED, ids=ids)
def test_the_defaults_are_as_good_as_that_of_h264(tmp_path, encoding):
    frames = real_frames(12, 144, 256)

    def psnr(of):
        back = [shown(f) for f in decoded(write_video(tmp_path / f"{of.codec}.{of.format}", [frames], encoding=of))]
        return 10 * np.log10(255**2 / np.mean((np.stack(back) - frames.numpy()) ** 2))

    assert abs(psnr(encoding) - psnr(MP4)) <= 0.3


@pytest.mark.parametrize("encoding", LOSSLESS, ids=ids)
def test_without_loss_every_pixel_is_within_2_of_255(tmp_path, encoding):
    colours = torch.randint(0, 256, (2, 64, 96, 3), generator=torch.Generator().manual_seed(0)).byte()
    for frames in (colours, real_frames(2)):
        path = write_video(tmp_path / f"x.{encoding.format}", [frames], encoding=encoding)
        back = np.rint(np.stack([shown(frame) for frame in decoded(path)]).clip(0, 255))
        # Samples are rounded to 8 bits in limited range: the error of blue is up to 255 * (0.5 / 219 + 1.8556 * 0.5 /
        # 224) = 1.64.
        assert np.abs(back - frames.numpy()).max() <= 2


def test_pictures_are_exact_and_gif_is_where_its_palette_suffices(tmp_path):
    frames = real_frames(5)
    assert np.array_equal(read_pictures(write_video(tmp_path / "x.webp", [frames], encoding=PICTURES[1]))[0], frames)
    still = write_video(tmp_path / "x.png", [frames[:1]], encoding=PNG)
    assert np.array_equal(np.array(Image.open(still)), frames[0])
    folder = write_video(tmp_path / "frames", frames.split([2, 3]), encoding=PNG, may_replace=False)
    assert [path.name for path in sorted(folder.iterdir())] == [f"{number:04d}.png" for number in range(1, 6)]
    assert np.array_equal(np.stack([np.array(Image.open(path)) for path in sorted(folder.iterdir())]), frames)
    assert write_video(folder, [frames[:2]], encoding=PNG, may_replace=False) == tmp_path / "frames_2"
    flat, _ = read_pictures(write_video(tmp_path / "x.gif", [flat_frames()], encoding=PICTURES[0]))
    assert np.abs(flat.astype(int) - flat_frames().numpy()).max() <= 4
    one = write_video(tmp_path / "one.gif", [frames[:1]], encoding=PICTURES[0])
    assert read_pictures(one)[1] == [None], "a single picture has no duration"
    # With a palette of 255 colours, most pixels have an error of a few levels, but dithering keeps the mean.
    back, _ = read_pictures(write_video(tmp_path / "y.gif", [frames], encoding=PICTURES[0]))
    assert np.abs(back.mean((0, 1, 2)) - frames.numpy().mean((0, 1, 2))).max() < 2
    assert 1 < np.abs(back.astype(int) - frames.numpy()).mean() < 12


@pytest.mark.parametrize("encoding", PICTURES, ids=ids)
def test_animations_last_as_long_as_the_video(tmp_path, encoding):
    path = write_video(tmp_path / f"x.{encoding.format}", [real_frames(31, 32, 48)], encoding=encoding)
    frames, milliseconds = read_pictures(path)
    assert len(frames) == 31 and abs(sum(milliseconds) - 31000 / 30) <= 5
    assert set(milliseconds) == ({30, 40} if encoding.format == "gif" else {33, 34})


@pytest.mark.parametrize("encoding", [MP4, *PICTURES, PNG], ids=ids)
def test_a_failed_write_leaves_no_file(tmp_path, encoding):
    def broken():
        yield flat_frames(3)
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        write_video(tmp_path / "x", broken(), encoding=encoding, may_replace=False)
    assert not list(tmp_path.iterdir())


def test_rounding_errors_of_frame_durations_do_not_accumulate():
    assert sum(durations(163, 30, 10)) == 5430 and sum(durations(163, 30, 1)) == 5433
    assert sum(durations(163, 24, 10)) == 6790 and set(durations(163, 24, 10)) == {40, 50}


@pytest.mark.parametrize("encoding", CODED, ids=ids)
@pytest.mark.parametrize("fps", [24.0, 23.976, 12.5, 1.0, 120.0])
def test_a_video_has_the_rate_that_is_asked_for(tmp_path, encoding, fps):
    path = write_video(tmp_path / f"x.{encoding.format}", [flat_frames(3)], encoding=encoding, fps=fps)
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-5)
    # Matroska counts milliseconds.
    times = [frame.time for frame in decoded(path)]
    assert times == pytest.approx([0, 1 / fps, 2 / fps], abs=6e-4)


@pytest.mark.parametrize("encoding", [*CODED, *LOSSLESS, *PICTURES, PNG], ids=ids)
def test_the_same_frames_are_the_same_file_in_every_format(tmp_path, encoding):
    frames = real_frames(1 if encoding == PNG else 4, 48, 64)
    files = [write_video(tmp_path / f"{i}.{encoding.format}", [frames], encoding=encoding, metadata=METADATA)
             for i in range(3)]  # fmt: skip
    assert len({path.read_bytes() for path in files}) == 1


@pytest.mark.parametrize("encoding", [*CODED, *PICTURES, PNG], ids=ids)
def test_a_file_contains_its_metadata_if_there_is_any(tmp_path, encoding):
    frames = flat_frames(1 if encoding == PNG else 2)
    tagged = write_video(tmp_path / f"x.{encoding.format}", [frames], encoding=encoding, metadata=METADATA)
    plain = write_video(tmp_path / f"y.{encoding.format}", [frames], encoding=encoding)
    assert b"wine" in tagged.read_bytes() and b"wine" not in plain.read_bytes()
    if encoding.codec:
        with av.open(str(tagged)) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
        title, comment = tags["title"], tags["comment"]
    else:
        info = Image.open(tagged).info
        if encoding.format == "png":
            title, comment = info["Title"], info["Comment"]
        elif encoding.format == "gif":
            title, comment = (json.loads(info["comment"])[key] for key in ("title", "comment"))
        else:
            root = ElementTree.fromstring(info["xmp"])
            dublin = "{http://purl.org/dc/elements/1.1/}"
            title, comment = ("".join(root.find(f".//{dublin}{key}").itertext()) for key in ("title", "description"))
    assert title.rstrip(" \0") == "käse & <wine>" and json.loads(comment) == {"prompt": "käse & <wine>", "seed": 3}


def test_without_an_encoding_the_suffix_decides(tmp_path):
    frames = torch.zeros(3, 32, 48, 3, dtype=torch.uint8)
    starts = {".mp4": b"ftyp", ".webm": b"\x1aE\xdf\xa3", ".gif": b"GIF8", ".webp": b"RIFF"}
    for suffix, start in starts.items():
        assert start in write_video(tmp_path / f"a{suffix}", [frames]).read_bytes()[:12]
    with pytest.raises(ConfigError, match=r"a\.mkv: no format has this suffix: use \.mp4, "):
        write_video(tmp_path / "a.mkv", [frames])


def test_quicktime_plays_hevc_and_the_index_knows_the_codecs(tmp_path):
    for codec, tag in (("h264", "avc1"), ("hevc", "hvc1"), ("av1", "av01")):
        path = write_video(tmp_path / f"{codec}.mp4", [flat_frames()], encoding=Encoding("mp4", codec, 20))
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.codec_tag == tag and stream.average_rate == Fraction(30)


def test_av1_leaves_the_process_as_it_was(tmp_path):
    before = os.sched_getscheduler(0)
    write_video(tmp_path / "x.webm", [flat_frames()], encoding=Encoding("webm", "av1", 30))
    assert os.sched_getscheduler(0) == before


def chosen(num_frames=13, **settings):
    return choose_encoding(SampleConfig(**settings), num_frames)


def test_the_suffix_or_the_setting_chooses(tmp_path):
    assert chosen() == MP4 == Encoding("mp4", "h264", 17) and chosen(num_frames=1) == PNG
    assert chosen(out="a/x.webm") == Encoding("webm", "vp9", 16) == chosen(format="webm", out="folder")
    assert chosen(out="x.gif").codec is None and chosen(format="png") == PNG
    assert chosen(num_frames=1, out="x.mp4") == MP4 and chosen(num_frames=1, format="webp").format == "webp"
    assert chosen(codec="av1", crf=30) == Encoding("mp4", "av1", 30) and chosen(codec="hevc", crf=0).is_lossless
    assert chosen(out="v1.5") == MP4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"out": "x.avi"}, r"out=x\.avi has an unknown suffix: use \.mp4, \.webm, \.gif, \.webp or \.png"),
        ({"out": "x.mp4", "format": "webm"}, r"out=x\.mp4 is not a webm file"),
        ({"out": "x.png"}, r"out=x\.png is one picture, but 13 frames are requested"),
        ({"codec": "vp9"}, r"sample\.codec=vp9 is not for mp4: use h264 or hevc or av1"),
        ({"format": "webm", "codec": "h264"}, r"codec=h264 is not for webm: use vp9 or av1"),
        ({"format": "gif", "crf": 3}, r"sample\.crf=3 has no meaning for gif"),
        ({"format": "webp", "codec": "h264"}, r"sample\.codec=h264 has no meaning for webp"),
        ({"format": "gif", "fps": 60}, r"sample\.fps=60 is not for gif: use at most 50"),
        ({"crf": 52}, r"sample\.crf=52 does not fit h264: use 0 \(best\) to 51"),
        ({"codec": "av1", "crf": 0}, r"sample\.crf=0 does not fit av1: use 1 .*lossless are h264, hevc and vp9"),
    ],
)
def test_what_contradicts_itself_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        chosen(**settings)


def test_an_encoder_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(formats.CODECS, "av1", Codec("libnone", (1, 63), 16))
    with pytest.raises(ConfigError, match=r"sample\.codec=av1 needs the encoder libnone, which PyAV [\d.]+ here lacks"):
        chosen(codec="av1")
    assert re.match(r"\d", av.__version__)
