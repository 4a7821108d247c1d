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
