import json
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_video import write_video

from mochi_tune.config.schema import DataConfig
from mochi_tune.data.rows import CacheSettings
from mochi_tune.data_prep import gather, hashes
from mochi_tune.data_prep.gather import _kept_scans, _KnownFiles, cut_inputs, find_inputs
from mochi_tune.data_prep.hashes import signature
from mochi_tune.data_prep.probe import Scan, scan_video
from mochi_tune.data_prep.report import not_taken
from mochi_tune.files import file_sha256


def test_a_run_that_is_stopped_while_it_reads_files_keeps_what_it_has_read(tmp_path, monkeypatch):
    # Also save hashes of files that were just written.
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", -60.0)
    for name in ("SAVE_SECONDS", "SAVE_TIMES"):
        monkeypatch.setattr(gather, name, 0)
    # In this process, to avoid the child's start.
    decoder = SimpleNamespace(scan=scan_video)
    videos = [write_video(tmp_path / f"{number}.mp4", 3, first_number=number) for number in range(3)]

    def kept() -> list[list[str]]:
        """Returns the saved hashes of files and of scans."""
        files = json.loads((tmp_path / ".files.json").read_text())["files"]
        scans = json.loads((tmp_path / ".scans.json").read_text())["scans"]
        return [[entry[3] for entry in files.values()], list(scans)]

    def read(known: _KnownFiles, number: int) -> None:
        sha256, scan = known.read(videos[number], signature(videos[number]), decoder)
        assert sha256 == file_sha256(videos[number]) and scan.num_frames == 3

    first, second, third = map(file_sha256, videos)
    with pytest.raises(KeyboardInterrupt), _KnownFiles(tmp_path, "") as known:
        read(known, 0)
        read(known, 1)
        # Earlier files are saved already, in case the process is killed.
        assert kept() == [[first]] * 2
        raise KeyboardInterrupt
    assert kept() == [[first, second]] * 2
    # The next run stops before these files.
    with pytest.raises(KeyboardInterrupt), _KnownFiles(tmp_path, "") as known:
        read(known, 2)
        raise KeyboardInterrupt
    assert kept() == [[first, second, third]] * 2
    # A folder that cannot be written to does not replace the reason for the end.
    with pytest.raises(KeyboardInterrupt), _KnownFiles(tmp_path / "gone", "") as known:
        read(known, 0)
        raise KeyboardInterrupt
    # A run that ends normally saves only the files that it has read.
    with _KnownFiles(tmp_path, "") as known:
        read(known, 1)
    assert kept() == [[second]] * 2


def test_scans_of_another_version_are_not_used(tmp_path):
    path = tmp_path / ".scans.json"
    for version, expected in ((gather._SCANS_VERSION, {"x": Scan(4, 4)}), (gather._SCANS_VERSION + 1, {})):
        path.write_text(json.dumps({"version": version, "scans": {"x": Scan(4, 4).to_json()}}))
        assert _kept_scans(path) == expected


def test_clips_beside_a_dataset_are_told_as_not_used(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("loose.mp4", "named.mp4"):
        write_video(videos / name, 3)
    row = {"video": {"bytes": None, "path": "named.mp4"}, "caption": "a cat"}
    pq.write_table(pa.Table.from_pylist([row]), videos / "x.parquet")
    inputs = find_inputs(DataConfig(videos=str(videos), cache=str(tmp_path / "cache")), 0)
    assert [file.captions for file in inputs.files.values()] == [("a cat",)] and inputs.unused.keys() == {"loose.mp4"}
    assert not_taken(inputs) == [
        "not used: 1 file next to a dataset (loose.mp4): clips that it lacks need a folder of their own in data.sources"
    ]


def test_files_whose_colours_are_read_by_newer_rules_have_other_keys(tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", 7)
    keys = []
    for rules in (1, 2):
        data = DataConfig(
            videos=str(tmp_path / "videos"), cache=str(tmp_path / str(rules)), buckets=[[7, 32, 48]],
            allow_empty_captions=True,
        )  # fmt: skip
        decoder = SimpleNamespace(scan=lambda path, rules=rules: replace(scan_video(path), colour_rules=rules))
        (tmp_path / str(rules)).mkdir()
        inputs = find_inputs(data, 0)
        cut_inputs(inputs, data, CacheSettings({"version": 2}, "", "", "", ""), decoder)
        keys.append([clip.row.clip_key for clip in inputs.clips])
    assert len(keys[0]) == len(keys[1]) == 1 and keys[0] != keys[1]
