import json
import struct
from fractions import Fraction
from pathlib import Path

import pytest
from helpers_video import frame_number, write_bad_video, write_video

from mochi_tune.data_prep.clips import Cut, decode_clip
from mochi_tune.data_prep.probe import Scan, read_index, scan_video
from mochi_tune.errors import DataError


def _error(path: Path, transform: Cut | None = None) -> str:
    with pytest.raises(DataError) as info:
        decode_clip(path, transform or Cut(7, 64, 64))
    message = str(info.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def test_the_times_are_exact_ascending_and_those_of_the_frames(tmp_path):
    times = [Fraction(5), Fraction(51, 10), Fraction(26, 5), Fraction(59, 10)]
    source = read_index(write_video(tmp_path / "clip.mp4", timestamps=times))
    assert [source.time(number) for number in range(4)] == times
    scan = source.scan
    assert (scan.width, scan.height, scan.rotation, scan.codec, scan.pixel_aspect) == (64, 64, 0, "h264", 1.0)
    assert scan.num_source_frames == 4 and scan.start_seconds == 5 and not scan.is_constant_rate
    assert Scan.from_json(json.loads(json.dumps(scan.to_json()))) == scan


def test_what_an_edit_list_hides_is_not_shown(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 60, options={"g": "12"})
    data = bytearray(path.read_bytes())
    # elst: version, count, duration in ms, start in the track's time base (here 1/30000 s).
    start = data.find(b"elst") + 12
    _, media_time = struct.unpack_from(">Ii", data, start)
    struct.pack_into(">Ii", data, start, 1000, media_time + 20 * 1000)
    path.write_bytes(data)
    clip = decode_clip(path, Cut(25, 64, 64))
    assert [frame_number(frame) for frame in clip.frames] == list(range(20, 45))
    assert clip.report["source_frames"] == 30
    assert "has 30 frames" in _error(path, Cut(31, 64, 64))


def test_a_clip_that_is_askew_is_refused(tmp_path):
    path = write_video(tmp_path / "askew.mp4", 7, rotation=90)
    data = bytearray(path.read_bytes())
    # The track header's matrix, 16.16 numbers after 40 bytes: a rotation by 45 degrees.
    struct.pack_into(">iiiii", data, data.find(b"tkhd") + 44, 46341, 46341, 0, -46341, 46341)
    path.write_bytes(data)
    assert "45 degrees" in _error(path)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_by_name(tmp_path, container, transfer, name):
    path = write_video(tmp_path / f"clip.{container}", 7, color_transfer=transfer)
    assert f"HDR, {name}" in _error(path)
    path = write_video(tmp_path / f"sdr.{container}", 7, color_transfer=1)
    assert len(decode_clip(path, Cut(7, 64, 64)).frames) == 7


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "empty (0 bytes)"),
        ("garbage", "cannot be read"),
        ("audio", "no video stream, only audio"),
        ("no moov", "cannot be read"),
        ("cut mdat", "bytes are missing"),
        ("cut mdat between frames", "bytes are missing"),
        ("cut.mkv", "announces 3.00 s"),
        ("damaged", "(codec h264): it is damaged"),
        ("concealed", "s (codec mpeg4): it is damaged"),
        ("damaged begin", "cannot be decoded after 0.00 s (codec h264): it is damaged"),
        ("over-reported", "lists 900 frames and it has 90"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, kind, words):
    assert words in _error(write_bad_video(tmp_path, kind), Cut(85, 128, 128))


def test_a_missing_file_is_refused(tmp_path):
    assert "No such file" in _error(tmp_path / "none.mp4")


def test_a_packet_that_shows_nothing_holds_the_picture_before(tmp_path):
    path = write_bad_video(tmp_path, "hollow")
    clip = decode_clip(path, Cut(90, 128, 128))
    numbers = [frame_number(frame) for frame in clip.frames]
    (hidden,) = set(range(90)) - set(numbers)
    assert numbers == [number - (number == hidden) for number in range(90)]
    assert scan_video(path).num_source_frames == 89


@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_a_matroska_file_that_is_cut_short_is_refused_without_a_stated_duration(tmp_path, suffix):
    path = write_video(tmp_path / f"a{suffix}", 60)
    data = path.read_bytes().replace(b"DURATION", b"DURATIOX")
    path.write_bytes(data[:-300])
    assert "is cut short, 300 bytes are missing" in _error(path)
    # Bytes behind the segment are no damage, and a recording that was not finished states no size.
    path.write_bytes(data + bytes(10))
    assert scan_video(path).num_frames == 60
    live = write_video(tmp_path / f"live{suffix}", 60, container_options={"live": "1"})
    live.write_bytes(live.read_bytes()[:-300])
    assert scan_video(live).num_frames >= 40


def test_an_avi_may_repeat_pictures_by_empty_chunks(tmp_path):
    times = [Fraction(n + 3 * (n > 10), 30) for n in range(30)]
    clip = decode_clip(write_video(tmp_path / "a.avi", timestamps=times), Cut(33, 64, 64))
    assert [frame_number(frame) for frame in clip.frames] == [*range(11), 10, 10, 10, *range(11, 30)]


@pytest.mark.parametrize("name", ["10:30.mp4", "10:00/a.mp4", "data:x.mp4", "a%03d.mp4"])
def test_a_relative_path_is_never_an_address(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write_video(tmp_path / "a.mp4", 7).rename(path)
    monkeypatch.chdir(tmp_path)
    assert len(decode_clip(Path(name), Cut(7, 64, 64)).frames) == 7
    assert len(decode_clip(Path(name), Cut(7, 64, 64, decoder="decord")).frames) == 7


def test_a_list_of_other_files_is_no_video(tmp_path):
    write_video(tmp_path / "a.mp4", 7)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    assert "is a list of other files (concat), not a video" in _error(tmp_path / "list.mp4")


def test_a_video_whose_times_span_years_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mkv", timestamps=[0, Fraction(1, 30), 3 * 365 * 86400])
    assert "lasts 26280 hours, more than 24" in _error(path)
