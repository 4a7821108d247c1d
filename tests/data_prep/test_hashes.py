import json
import os

import pytest

from mochi_tune.data_prep import hashes
from mochi_tune.data_prep.hashes import FileHashes, signature
from mochi_tune.errors import DataError
from mochi_tune.files import file_sha256


def hash_again(kept, video):
    known = FileHashes(kept)
    sha256 = known.sha256(video, signature(video))
    known.save()
    return sha256


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"frames" * 100)
    return path


def test_a_file_that_was_changed_a_moment_ago_is_read_again(tmp_path, video):
    kept = tmp_path / ".files.json"
    assert hash_again(kept, video) == file_sha256(video)
    assert json.loads(kept.read_text())["files"] == {}


def test_a_file_is_read_again_exactly_when_it_was_written_to(tmp_path, video, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", -60.0)
    kept, before = tmp_path / ".files.json", video.stat()
    assert hash_again(kept, video) == file_sha256(video)
    # The saved hash is returned: the file was not read.
    kept.write_text(kept.read_text().replace(file_sha256(video), "kept"))
    assert hash_again(kept, video) == "kept"
    # With the same size, name and modification time.
    video.write_bytes(b"others" * 100)
    os.utime(video, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (video.stat().st_size, video.stat().st_ino) == (before.st_size, before.st_ino)
    assert hash_again(kept, video) == file_sha256(video)
    other = tmp_path / "other.mp4"
    other.write_bytes(b"third." * 100)
    other.replace(video)
    assert hash_again(kept, video) == file_sha256(video)


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1, "files": {"a": [1]}}', '{"version": 2}', '{"files": 1}'])
def test_what_another_program_has_written_is_passed_over(tmp_path, video, content):
    kept = tmp_path / ".files.json"
    kept.write_text(content)
    assert hash_again(kept, video) == file_sha256(video)


def test_what_is_gone_or_no_file_is_refused(tmp_path, video):
    found = signature(video)
    video.unlink()
    for reading in (lambda: signature(video), lambda: FileHashes(tmp_path / "x").sha256(video, found)):
        with pytest.raises(DataError, match=r"a\.mp4: cannot be opened"):
            reading()
