import io
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_video import frame_number, is_upright, write_video
from PIL import Image

import mochi_tune
from mochi_tune.config.schema import DataConfig
from mochi_tune.data_prep import inspection
from mochi_tune.data_prep.clips import Cut
from mochi_tune.data_prep.inspection import (
    Flag,
    as_jpeg,
    choose_drawn,
    find_flags,
    inspect_clips,
    whole_frame,
)
from mochi_tune.data_prep.probe import Scan
from mochi_tune.models.text_encoder import MAX_TOKENS, MeasuredCaption, measure_caption
from mochi_tune.weights.folder import WeightsFolder

ASSETS = Path(mochi_tune.__file__).parent / "assets"
LONG_CAPTION = "a red bird flies over the sea " * 50


def add(folder: Path, name: str, num_frames: int, caption: str = "a bird", **options) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder / name, num_frames, **({"width": 96, "height": 64} | options))
    (folder / name).with_suffix(".txt").write_text(caption)


def settings(folder: Path, **more) -> DataConfig:
    sizes = {"buckets": [[13, 32, 48], [1, 32, 48]], "clips": "all", "decode_timeout_seconds": 600}
    return DataConfig(videos=str(folder / "videos"), cache=str(folder / "cache"), **(sizes | more))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A clip of three windows, a portrait phone clip, a still; three refused files, and three unused ones."""
    folder = tmp_path_factory.mktemp("inspection")
    videos = folder / "videos"
    add(videos, "wide.mp4", 40, LONG_CAPTION)
    add(videos, "phone.mov", 13, width=64, height=128, rotation=90)
    add(videos, "short.mp4", 5)
    (videos / "broken.mp4").write_bytes(b"no video")
    (videos / "broken.txt").write_text("broken")
    Image.fromarray(np.full((64, 96, 3), 200, np.uint8)).save(videos / "still.png")
    (videos / "still.txt").write_text("a wall")
    for name in ("notes.pdf", "alone.txt"):
        (videos / name).write_bytes(b"x")
    odd = os.fsencode(videos)
    for name in (b"odd\xe4.mp4", b"odd\xe4.zip"):
        Path(os.fsdecode(odd + b"/" + name)).write_bytes((videos / "wide.mp4").read_bytes())
    Path(os.fsdecode(odd + b"/odd\xe4.txt")).write_text("odd")
    return inspect_clips(settings(folder), 0, WeightsFolder(ASSETS / "tiny").load_tokenizer())


def numbers(pictures) -> list[int]:
    return [frame_number(np.asarray(Image.open(io.BytesIO(picture)))) for picture in pictures]


def test_every_clip_is_seen_with_its_own_frames(seen):
    by_name = {clip.clip.row.sample_id: clip for clip in seen.clips}
    assert sorted(by_name) == ["phone.mov", "still.png", "wide.mp4", "wide.mp4@13", "wide.mp4@26"]
    for name, start in (("wide.mp4", 0), ("wide.mp4@13", 13), ("wide.mp4@26", 26)):
        assert numbers(by_name[name].pictures) == [start + i for i in (0, 2, 5, 7, 10, 12)]
        assert numbers([by_name[name].source]) == [start]
    assert len(by_name["still.png"].pictures) == 1


def test_the_source_is_whole_and_upright_and_the_crop_lies_in_it(seen):
    phone = next(clip for clip in seen.clips if clip.clip.row.sample_id == "phone.mov")
    source = np.asarray(Image.open(io.BytesIO(phone.source)))
    assert source.shape == (128, 64, 3) and is_upright(source)
    # 64x128 is scaled to 48x96; the middle third is kept.
    assert phone.report["crop"] == pytest.approx([0, 128 / 3, 64, 128 / 3], abs=0.01)
    texts = {flag.text for flag in phone.flags}
    assert {"crop loses 67% of the picture", "turned by 90°"} <= texts


def test_what_is_refused_or_not_taken_has_its_reason(seen):
    assert sorted(seen.refused) == ["broken.mp4", "odd\\udce4.mp4", "short.mp4"]
    assert "has 5 frames" in seen.refused["short.mp4"] and "not valid UTF-8" in seen.refused["odd\\udce4.mp4"]
    assert sorted(seen.inputs.unused) == ["alone.txt", "notes.pdf", "odd\\udce4.zip"]
    for text in (*seen.refused.values(), *seen.inputs.unused.values()):
        text.encode()


def test_a_clip_that_cannot_be_decoded_is_refused_alone(tmp_path):
    add(tmp_path / "videos", "a.mp4", 13)
    add(tmp_path / "videos", "b.mp4", 13, color_transfer=16)
    found = inspect_clips(settings(tmp_path), 0, None)
    assert [clip.clip.row.sample_id for clip in found.clips] == ["a.mp4"]
    assert "is HDR" in found.refused["b.mp4"]


def test_a_clip_without_a_caption_is_flagged_and_not_the_end(tmp_path):
    add(tmp_path / "videos", "mute.mp4", 13, "")
    [clip] = inspect_clips(settings(tmp_path), 0, None).clips
    assert "no caption" in [flag.text for flag in clip.flags]


def test_of_too_many_clips_the_rest_is_read_without_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "MAX_DRAWN", 1)
    add(tmp_path / "videos", "a.mp4", 13)
    add(tmp_path / "videos", "b.mp4", 13, width=64, height=128)
    found = inspect_clips(settings(tmp_path), 0, None)
    assert [(clip.clip.row.sample_id, len(clip.pictures), bool(clip.source)) for clip in found.clips] == [
        ("a.mp4", 0, False), ("b.mp4", 6, True),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", "toy"])
def test_a_caption_is_read_up_to_the_last_token_that_is_encoded(name):
    tokenizer = WeightsFolder(ASSETS / name).load_tokenizer()
    measured = measure_caption(LONG_CAPTION, tokenizer)
    ids = tokenizer(LONG_CAPTION).input_ids
    assert measured.num_tokens == len(ids) and measured.lost_tokens == len(ids) - MAX_TOKENS > 0
    read = LONG_CAPTION[: measured.num_read]
    # The encoder reads 256 tokens, the last of which is the end token.
    assert tokenizer(read).input_ids == tokenizer(LONG_CAPTION, max_length=MAX_TOKENS, truncation=True).input_ids
    short = measure_caption("a bird", tokenizer)
    assert short.num_read == 6 and short.lost_tokens == 0 and short.num_tokens == len(tokenizer("a bird").input_ids)


def test_without_a_tokenizer_the_length_is_not_known():
    assert measure_caption(LONG_CAPTION, None) == MeasuredCaption(LONG_CAPTION, None, len(LONG_CAPTION))


def scan_of(**more) -> Scan:
    return Scan(**({"width": 96, "height": 64, "num_frames": 40, "num_source_frames": 40, "source_seconds": 1.3,
                    "source_fps": 30.0} | more))  # fmt: skip


@pytest.mark.parametrize(
    ("scan", "cut", "text", "weight"),
    [
        ({"width": 64, "height": 128}, {}, "crop loses 67% of the picture", "warning"),
        ({"width": 24, "height": 16}, {"allow_upscale": True}, "enlarged 2.00 times", "warning"),
        ({"has_discontinuity": True}, {}, "its clock jumps", "warning"),
        ({"hdr": "PQ"}, {"hdr": "tonemap"}, "HDR, PQ, tone-mapped", "notable"),
        ({"is_interlaced": True}, {}, "deinterlaced", "notable"),
        ({"rotation": 270}, {}, "turned by 270°", "notable"),
        ({"is_mirrored": True, "rotation": 180}, {}, "mirrored", "notable"),
        ({"pixel_aspect": 16 / 15}, {}, "pixels 1.07 times as wide as high, made square", "notable"),
        ({"source_fps": 24.0}, {"frame_rate": "retime"}, "24 fps played at 30", "notable"),
        ({"color_matrix": "BT.601 (assumed)"}, {}, "colours: BT.601 (assumed)", "mild"),
    ],
)
def test_each_oddity_of_a_clip_has_its_flag_and_no_other(scan, cut, text, weight):
    caption = MeasuredCaption("a bird", 3, 6)
    assert find_flags(scan_of(), Cut(13, 32, 48), [caption]) == ()
    assert find_flags(scan_of(**scan), Cut(13, 32, 48, **cut), [caption]) == (Flag(text, weight),)


def test_repeated_frames_and_captions_have_flags():
    report = {"distinct_frames": 6, "crop": [0, 0, 96, 64], "source_width": 96, "source_height": 64}
    long, none = MeasuredCaption("long", 300, 2), MeasuredCaption("", None, 0)
    found = find_flags(scan_of(), Cut(13, 32, 48), [long, none], report)
    assert [flag.text for flag in found] == ["6 distinct of 13 frames", "caption loses 44 tokens"]
    assert [flag.text for flag in find_flags(scan_of(), Cut(1, 32, 48), [none])] == ["no caption"]


def test_the_weightiest_clips_are_drawn_and_of_the_others_an_even_choice():
    mild, notable, warning = ((Flag("", weight),) for weight in ("mild", "notable", "warning"))
    flags = [warning if i in (3, 50) else notable if i == 7 else mild if i % 2 else () for i in range(103)]
    assert choose_drawn(flags, 200) == set(range(103))
    chosen = sorted(choose_drawn(flags, 13))
    assert len(chosen) == 13 and {3, 7, 50} <= set(chosen)
    others = [i for i in chosen if i not in (3, 7, 50)]
    assert all(8 <= after - before <= 12 for before, after in pairwise(others))
    assert choose_drawn(flags, 1) == {3}


def test_a_whole_frame_keeps_its_shape():
    cut = whole_frame(scan_of(width=1080, height=1920), Cut(13, 32, 48, 26, hdr="tonemap"))
    assert (cut.num_frames, cut.height, cut.width, cut.start, cut.hdr) == (1, 240, 135, 26, "tonemap")
    assert whole_frame(scan_of(), Cut(13, 32, 48)).width == 96


def test_a_picture_is_made_smaller_only():
    frame = torch.zeros(400, 200, 3, dtype=torch.uint8)
    assert Image.open(io.BytesIO(as_jpeg(frame, 100))).size == (50, 100)
    assert Image.open(io.BytesIO(as_jpeg(frame, 1000))).size == (200, 400)
