import json
from types import SimpleNamespace

import pytest
from helpers_video import write_video

from mochi_tune.data_prep import gather, hashes
from mochi_tune.data_prep.gather import _KnownFiles
from mochi_tune.data_prep.hashes import signature
from mochi_tune.data_prep.probe import scan_video
from mochi_tune.files import file_sha256


def test_a_run_that_is_stopped_while_it_reads_files_keeps_what_it_has_read(tmp_path, monkeypatch):
    # A video that was written a moment ago counts as well.
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", -60.0)
    for name in ("SAVE_SECONDS", "SAVE_TIMES"):
        monkeypatch.setattr(gather, name, 0)
    # In this process, which needs no time to start.
    decoder = SimpleNamespace(scan=scan_video)
    videos = [write_video(tmp_path / f"{number}.mp4", 3, first_number=number) for number in range(3)]

    def kept() -> list[list[str]]:
        """Returns what is kept in the cache's folder: hashes by file, and of scans."""
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
        # What came before is there already, for the case that the process is killed.
        assert kept() == [[first]] * 2
        raise KeyboardInterrupt
    assert kept() == [[first, second]] * 2
    # The next run is stopped before it gets to them.
    with pytest.raises(KeyboardInterrupt), _KnownFiles(tmp_path, "") as known:
        read(known, 2)
        raise KeyboardInterrupt
    assert kept() == [[first, second, third]] * 2
    # One that ends keeps what is there.
    with _KnownFiles(tmp_path, "") as known:
        read(known, 1)
    assert kept() == [[second]] * 2
