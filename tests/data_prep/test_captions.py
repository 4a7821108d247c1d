import json
import os
from pathlib import Path

import pytest

from mochi_tune.data_prep.captions import find_orphans, load_captions
from mochi_tune.errors import DataError


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    (tmp_path / "sub").mkdir()
    # Captions never open a video, so their names are enough here.
    return [tmp_path / "a.mp4", tmp_path / "b.take2.mov", tmp_path / "sub" / "c.mkv"]


def _write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _error(folder: Path, videos: list[Path]) -> str:
    with pytest.raises(DataError) as info:
        load_captions(folder, videos)
    message = str(info.value)
    assert "\n" not in message
    return message


def test_sidecars_are_stripped_and_joined_to_one_line(tmp_path, videos):
    _write(videos[0].with_name("a.txt"), "  a cat \r\n\n on a mat\n")
    _write(videos[1].with_name("b.take2.txt"), "\ufeffein Käse")
    _write(videos[2].with_name("c.txt"), "deep  down")
    _write(tmp_path / "notes.txt", "not a caption")
    assert load_captions(tmp_path, videos) == {
        videos[0]: "a cat on a mat",
        videos[1]: "ein Käse",
        videos[2]: "deep  down",
    }


def test_orphans_are_the_text_files_that_no_video_reads(tmp_path, videos):
    for name in ("a.txt", "b.take2.txt", "sub/c.txt", ".hidden.txt", "metadata.csv"):
        _write(tmp_path / name, "words")
    assert find_orphans(tmp_path, videos) == []
    for name in ("sub/a.txt", "b.txt", "b.TXT", "A.txt"):
        _write(tmp_path / name, "words")
    _write(Path(os.fsdecode(bytes(tmp_path) + b"/c\xe4.txt")), "words")
    assert find_orphans(tmp_path, videos) == ["A.txt", "b.TXT", "b.txt", "c\\udce4.txt", "sub/a.txt"]


def test_an_empty_caption_counts_as_absent(tmp_path, videos):
    _write(videos[0].with_name("a.txt"), " \n\n")
    _write(tmp_path / "metadata.csv", "file_name,caption\nb.take2.mov,  \n")
    assert load_captions(tmp_path, videos) == {}


@pytest.mark.parametrize("key", ["caption", "text", "prompt"])
def test_metadata_csv_names_videos_relative_to_the_folder(tmp_path, videos, key):
    rows = f'length,{key},file_name\n3,"a cat, ""asleep""\non a mat",a.mp4\n\n4,ein Käse,sub/c.mkv\n'
    _write(tmp_path / "metadata.csv", "\ufeff" + rows)
    assert load_captions(tmp_path, videos) == {videos[0]: 'a cat, "asleep" on a mat', videos[2]: "ein Käse"}


@pytest.mark.parametrize("key", ["caption", "text", "prompt"])
def test_metadata_jsonl_names_videos_relative_to_the_folder(tmp_path, videos, key):
    rows = [{"file_name": "a.mp4", key: "a cat\u2028asleep"}, {"file_name": "sub/c.mkv", key: "Käse", "fps": 3}]
    _write(tmp_path / "metadata.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert load_captions(tmp_path, videos) == {videos[0]: "a cat asleep", videos[2]: "Käse"}


def test_caption_comes_before_text_and_prompt(tmp_path, videos):
    _write(tmp_path / "metadata.csv", "file_name,prompt,text,caption\na.mp4,1,2,3\n")
    assert load_captions(tmp_path, videos) == {videos[0]: "3"}


def test_a_sidecar_wins_over_metadata_unless_it_is_empty(tmp_path, videos):
    _write(tmp_path / "metadata.csv", "file_name,text\na.mp4,from the table\nb.take2.mov,also\n")
    _write(tmp_path / "a.txt", "from the sidecar")
    _write(tmp_path / "b.take2.txt", "")
    assert load_captions(tmp_path, videos) == {videos[0]: "from the sidecar", videos[1]: "also"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.csv", "file_name,text\na.mp4,x\nz.mp4,y\n", ["row 3", "z.mp4", "not among the videos"]),
        ("metadata.csv", "file_name,text\na.mp4,x\na.mp4,y\n", ["row 3", "a.mp4", "already"]),
        ("metadata.csv", "file_name,text\na.mp4,x,y\n", ["row 2", "3 fields", "header has 2"]),
        ("metadata.csv", "file_name,text\na.mp4\n", ["row 2", "1 fields", "header has 2"]),
        ("metadata.csv", 'file_name,text\na.mp4,"x" y\n', ["row 2", "not CSV"]),
        ("metadata.csv", "file_name,text\n ,x\n", ["row 2", "no file_name"]),
        ("metadata.csv", "file,text\na.mp4,x\n", ["file, text", "file_name"]),
        ("metadata.csv", "file_name,words\na.mp4,x\n", ["file_name, words", "caption, text, prompt"]),
        ("metadata.csv", "file_name,text,text\na.mp4,x,y\n", ["file_name, text, text", "once"]),
        ("metadata.csv", "", ["none", "file_name"]),
        ("metadata.csv", b"file_name,text\na.mp4,K\xe4se\n", ["not UTF-8", "byte 22"]),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}\n{"file_name": ', ["row 2", "not JSON"]),
        ("metadata.jsonl", '["a.mp4", "x"]', ["row 1", "object"]),
        ("metadata.jsonl", '{"file_name": "a.mp4", "words": "x"}', ["row 1", "caption, text, prompt"]),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": 3}', ["row 1", "as text"]),
        ("metadata.jsonl", '{"text": "x"}', ["row 1", "no file_name"]),
        ("metadata.jsonl", '{"file_name": "z.mp4", "text": "x"}', ["row 1", "z.mp4"]),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}\n' * 2, ["row 2", "a.mp4", "already"]),
    ],
)
def test_a_bad_metadata_file_is_an_error_that_names_the_row(tmp_path, videos, name, content, words):
    path = _write(tmp_path / name, content)
    message = _error(tmp_path, videos)
    assert message.startswith(str(path))
    for word in words:
        assert word in message


def test_a_sidecar_that_is_not_utf8_is_an_error_that_names_it(tmp_path, videos):
    path = _write(tmp_path / "a.txt", b"K\xe4se")
    assert _error(tmp_path, videos).startswith(f"{path}: is not UTF-8 (byte 1)")


def test_two_metadata_files_are_an_error(tmp_path, videos):
    _write(tmp_path / "metadata.csv", "file_name,text\na.mp4,x\n")
    _write(tmp_path / "metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}')
    assert "metadata.csv and metadata.jsonl" in _error(tmp_path, videos)
