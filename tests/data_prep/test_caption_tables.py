import json
import os
from pathlib import Path

import pytest

from mochi_tune.data_prep.caption_tables import _skip_to_header, read_tables
from mochi_tune.data_prep.captions import CaptionRules, load_captions
from mochi_tune.errors import DataError

RULES = CaptionRules()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips" / "sub").mkdir(parents=True)
    return tmp_path / "clips"


@pytest.fixture
def videos(folder: Path) -> list[Path]:
    # Reading captions never opens a video, so empty files are enough.
    return [folder / "a.mp4", folder / "b.take2.mov", folder / "sub" / "c.mkv"]


def _write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _lines(*rows: dict) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"


def _texts(folder: Path, videos: list[Path]) -> dict[str, tuple[str, ...]]:
    """Returns the captions by the videos' names; checks that nothing is refused or noted."""
    found = load_captions(folder, videos, RULES)
    assert not found.refused and not found.notes
    return {video.relative_to(folder).as_posix(): texts for video, texts in found.texts.items()}


def _error(folder: Path, videos: list[Path]) -> str:
    with pytest.raises(DataError) as info:
        load_captions(folder, videos, RULES)
    message = str(info.value)
    message.encode()
    assert "\n" not in message and "\0" not in message
    return message


@pytest.mark.parametrize("key", ["caption", "text", "prompt", "Caption"])
def test_a_csv_names_videos_relative_to_its_folder(folder, videos, key):
    rows = f'length,{key},file_name\n3,"a cat, ""asleep""\non a mat",a.mp4\n\n4,ein Käse,sub/c.mkv\n,,\n'
    _write(folder / "metadata.csv", rows)
    assert _texts(folder, videos) == {"a.mp4": ('a cat, "asleep" on a mat',), "sub/c.mkv": ("ein Käse",)}


@pytest.mark.parametrize("key", ["caption", "text", "prompt", "captions"])
@pytest.mark.parametrize("file_key", ["file_name", "video", "path", "media_path", "video_path", "file"])
def test_json_lines_name_videos_relative_to_their_folder(folder, videos, key, file_key):
    rows = _lines({file_key: "a.mp4", key: "a cat\u2028asleep"}, {file_key: "sub/c.mkv", key: "Käse", "fps": 3})
    _write(folder / "metadata.jsonl", rows)
    assert _texts(folder, videos) == {"a.mp4": ("a cat asleep",), "sub/c.mkv": ("Käse",)}


def test_a_json_file_maps_names_to_captions(folder, videos):
    """The captions.json of diffusion-pipe."""
    _write(folder / "captions.json", json.dumps({"a.mp4": ["a cat", "the cat"], "sub/c.mkv": "a dog"}))
    found = {video.name: row.captions for video, [row] in read_tables(folder, videos).rows.items()}
    assert found == {"a.mp4": ("a cat", "the cat"), "c.mkv": ("a dog",)}


@pytest.mark.parametrize("name", ["metadata.json", "captions.json", "dataset.json", "METADATA.JSON"])
def test_a_json_file_holds_a_list_of_rows(folder, videos, name):
    _write(folder / name, json.dumps([{"media_path": "a.mp4", "caption": "a cat"}]))
    assert _texts(folder, videos) == {"a.mp4": ("a cat",)}


def test_the_layout_of_fastvideo_is_read(folder):
    _write(folder / "videos2caption.json", json.dumps([{"path": "a.mp4", "cap": ["a cat", "the cat"]}]))
    video = _write(folder / "videos" / "a.mp4", "")
    assert _texts(folder, [video]) == {"videos/a.mp4": ("a cat", "the cat")}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_separator_is_found_in_the_header(folder, videos, delimiter, encoding):
    table = 'file_name;"text"\r\na.mp4;"x, y; and\tz"\r\nsub/c.mkv;Käse\r\n'.replace(";", delimiter)
    _write(folder / "metadata.csv", table.encode(encoding))
    written = f"x, y{delimiter} and\tz"
    assert _texts(folder, videos) == {"a.mp4": (written,), "sub/c.mkv": ("Käse",)}


def test_a_tsv_is_separated_by_tabs(folder, videos):
    _write(folder / "captions.tsv", 'video\ttext\na.mp4\ta "big", fat cat; asleep\n')
    assert _texts(folder, videos) == {"a.mp4": ('a "big", fat cat; asleep',)}


def test_a_table_in_cp1252_is_read_and_told(folder, videos):
    path = _write(folder / "metadata.csv", "file_name,text\na.mp4,Käse\n".encode("cp1252"))
    found = load_captions(folder, videos, RULES)
    assert found.texts == {videos[0]: ("Käse",)}
    assert found.notes == (f"{path}: is not UTF-8 and was read as cp1252; save it as UTF-8 if letters are wrong",)


def test_the_first_of_the_known_columns_counts(folder, videos):
    _write(folder / "metadata.csv", "path,file_name,prompt,text,caption\nz,a.mp4,1,2,3\n")
    assert _texts(folder, videos) == {"a.mp4": ("3",)}


def test_rows_and_lists_of_one_video_are_several_captions(folder, videos):
    rows = [{"file_name": "a.mp4", "text": ["one", "two", " ", "one"]}, {"file_name": "a.mp4", "text": "three"}]
    _write(folder / "metadata.jsonl", _lines(*rows, {"file_name": "b.take2.mov", "text": None}))
    assert _texts(folder, videos) == {"a.mp4": ("one", "two", "three")}


def test_names_are_resolved_however_people_write_them(folder, videos):
    ways = ["a.mp4", "./a.mp4", "sub/../a.mp4", "clips/a.mp4", str(folder / "a.mp4"), "../clips/a.mp4", ".\\a.mp4"]
    for way in ways:
        _write(folder / "metadata.jsonl", _lines({"file_name": f" {way} ", "text": "a cat"}))
        assert _texts(folder, videos) == {"a.mp4": ("a cat",)}, way
    _write(folder / "metadata.jsonl", _lines({"file_name": "sub\\c.mkv", "text": "c"}))
    assert _texts(folder, videos) == {"sub/c.mkv": ("c",)}


def test_names_fit_a_folder_that_is_given_by_a_link_or_from_the_working_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for given, name in (("link", str(folder / "a.mp4")), ("clips", "clips/a.mp4"), ("clips", str(folder / "a.mp4"))):
        _write(folder / "metadata.jsonl", _lines({"file_name": name, "text": "a cat"}))
        assert _texts(Path(given), [Path(given) / "a.mp4"]) == {"a.mp4": ("a cat",)}


def test_a_table_in_a_sub_folder_names_the_videos_there(folder, videos):
    _write(folder / "sub" / "metadata.csv", "file_name,text\nc.mkv,deep\na.mp4,is not the one above\n")
    _write(folder / "metadata.csv", "file_name,text\na.mp4,top\nsub/c.mkv,also\n")
    found = load_captions(folder, videos, RULES)
    assert found.texts == {videos[0]: ("top",), videos[2]: ("also", "deep")}
    assert found.notes == (f"{folder / 'sub' / 'metadata.csv'}: 1 row names a video that is not there: a.mp4",)


def test_a_table_beside_the_videos_may_name_them_from_the_folder_of_all(folder, videos):
    _write(folder / "sub" / "metadata.csv", "file_name,text\nsub/c.mkv,deep\n")
    assert _texts(folder, videos) == {"sub/c.mkv": ("deep",)}


def test_a_row_of_a_still_that_is_not_taken_is_no_row_without_a_video(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "still.png").touch()
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.mp4,a cat\nstill.png,a wall\n")
    found = read_tables(tmp_path, [tmp_path / "a.mp4"])
    assert [row.captions for row in found.rows[tmp_path / "a.mp4"]] == [("a cat",)] and found.notes == []


def test_rows_without_a_video_are_counted_and_named(folder, videos):
    names = ["a.mp4", "x.mp4", "y\n\0.mp4", "\ud800.mp4", "../a.mp4", "/etc/passwd", "x.mp4"]
    path = _write(folder / "metadata.jsonl", "\n".join(json.dumps({"path": name, "text": "x"}) for name in names))
    found = load_captions(folder, videos, RULES)
    assert found.texts == {videos[0]: ("x",)} and not found.refused
    listed = r"x.mp4, y \x00.mp4, \ud800.mp4, ../a.mp4 and 1 more"
    assert found.notes == (f"{path}: 6 rows name videos that are not there: {listed}",)


def test_a_table_that_names_no_video_is_an_error_that_shows_both_names(folder, videos):
    path = _write(folder / "metadata.csv", "file_name,text\nz.mp4,x\ny.mp4,y\n")
    message = _error(folder, videos)
    assert message == (
        f"{path}: none of its 2 rows names a video in {folder}: row 2 names z.mp4, a video is a.mp4: write the names "
        f"relative to {folder}."
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.csv", "file_name,text\na.mp4,x,y\n", ["row 2", "3 fields", "header has 2"]),
        ("metadata.csv", "file_name,text\na.mp4\n", ["row 2", "1 fields", "header has 2"]),
        ("metadata.csv", 'file_name,text\na.mp4,"x" y\n', ["row 2", "not CSV"]),
        ("metadata.csv", 'file_name,text\na.mp4,"x\n', ["row 2", "not CSV"]),
        ("metadata.csv", "file_name,text\n ,x\n", ["row 2", "names no video"]),
        ("metadata.csv", "name,text\na.mp4,x\n", ["name, text", "file_name"]),
        ("metadata.csv", "file_name;words\na.mp4;x\n", ["file_name, words", "caption, text, prompt"]),
        ("metadata.csv", "file_name,text,text\na.mp4,x,y\n", ["file_name, text, text", "without duplicates"]),
        ("metadata.csv", "", ["none", "file_name"]),
        ("metadata.csv", b"file_name,text\na.mp4,K\xe4se\x81\n", ["not UTF-8", "byte 22"]),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}\n{"file_name": ', ["row 2", "not JSON"]),
        ("metadata.jsonl", "[" * 100_000, ["row 1", "not JSON"]),
        ("metadata.jsonl", '["a.mp4", "x"]', ["row 1", "names no video"]),
        ("metadata.jsonl", '{"text": "x"}', ["row 1", "names no video"]),
        ("metadata.jsonl", '{"file_name": 3, "text": "x"}', ["row 1", "names no video"]),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "x", "Text": "y"}', ["row 1", "text more", "(text, Text)"]),
        ("metadata.json", '{"file_name": "a.mp4", "text": "x"}', ["not a list of objects", "rename the file"]),
        ("metadata.json", '{"name": "my set", "fps": 30}', ["not a list of objects", "rename the file"]),
        ("metadata.json", "[", ["not JSON"]),
    ],
)
def test_a_broken_table_is_an_error_that_names_the_row(folder, videos, name, content, words):
    path = _write(folder / name, content)
    message = _error(folder, videos)
    assert message.startswith(str(path))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"file_name": "a.mp4", "text": "a cat \\ud83d"}', ["contains half of a character, \\ud83d"]),
        ('{"file_name": "a.mp4", "text": "a\\u0000cat"}', ["contains NUL"]),
        ('{"file_name": "a.mp4", "text": 3}', ["text must be a text, or a list of texts"]),
        ('{"file_name": "a.mp4", "text": ["x", null]}', ["text must be a text, or a list of texts"]),
        ('{"file_name": "a.mp4", "words": "x"}', ["has none of caption, text, prompt"]),
        ('{"file_name": "a.mp4", "text": "%s"}' % ("x" * 50_001), ["has a caption of 50001 characters"]),
        ('{"file_name": "a.mp4", "text": ["fine", "a cat \\ud83d"]}', ["contains half of a character"]),
    ],
)
def test_a_row_with_a_bad_caption_refuses_its_clip_alone(folder, videos, row, words):
    path = _write(folder / "metadata.jsonl", f'{row}\n{{"file_name": "sub/c.mkv", "text": "ok \\ud83d\\ude00"}}')
    found = load_captions(folder, videos, RULES)
    assert found.texts == {videos[2]: ("ok \U0001f600",)} and found.refused.keys() == {videos[0]}
    reason = found.refused[videos[0]]
    assert f"{path} row 1" in reason and "\n" not in reason and reason.encode()
    assert all(word in reason for word in words)


def test_two_tables_in_a_folder_are_an_error(folder, videos):
    _write(folder / "metadata.csv", "file_name,text\na.mp4,x\n")
    _write(folder / "metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}')
    assert "metadata.csv and metadata.jsonl: keep one" in _error(folder, videos)


@pytest.mark.parametrize("names", [("videos.txt", "prompts.txt"), ("video.txt", "captions.txt")])
def test_a_list_of_videos_and_one_of_captions_are_a_table(folder, videos, names):
    _write(folder / names[0], "sub/c.mkv\na.mp4\n\n\n")
    _write(folder / names[1], "\ufeffdeep\u2028down\r\na cat\r\n")
    assert _texts(folder, videos) == {"a.mp4": ("a cat",), "sub/c.mkv": ("deep down",)}
    _write(folder / "metadata.csv", "file_name,text\na.mp4,the table wins\n")
    assert _texts(folder, videos) == {"a.mp4": ("the table wins",)}


def test_a_last_caption_that_is_empty_is_a_line_too(folder, videos):
    _write(folder / "videos.txt", "a.mp4\nsub/c.mkv\n")
    _write(folder / "prompts.txt", "a cat\n\n")
    assert _texts(folder, videos) == {"a.mp4": ("a cat",)}


def test_lists_of_different_lengths_are_an_error_that_says_both(folder, videos):
    _write(folder / "videos.txt", "a.mp4\nsub/c.mkv\n")
    _write(folder / "prompts.txt", "a cat\n")
    assert "videos.txt has 2 lines and prompts.txt has 1" in _error(folder, videos)
    _write(folder / "prompts.txt", "a cat\n\n\nmore\n")
    assert "videos.txt has 2 lines and prompts.txt has 4" in _error(folder, videos)
    _write(folder / "videos.txt", "a.mp4\n\n")
    _write(folder / "prompts.txt", "a cat\na dog\n")
    assert "videos.txt row 2: is blank" in _error(folder, videos)


def test_no_file_is_opened_by_a_name_in_a_table(folder, videos):
    pipe = folder.parent / "outside.mp4"
    os.mkfifo(pipe)  # Opening it would block.
    _write(folder / "metadata.jsonl", _lines({"path": str(pipe), "text": "x"}, {"path": "a.mp4", "text": "x"}))
    assert load_captions(folder, videos, RULES).texts == {videos[0]: ("x",)}


@pytest.mark.parametrize("separator", [",", ";"])
def test_a_space_behind_the_separator_is_none_of_the_caption(folder, videos, separator):
    rows = 'file_name, text\na.mp4, "a cat, a ""dog""; both"\nsub/c.mkv, Käse\n'
    _write(folder / "metadata.csv", "\n".join(row.replace(", ", f"{separator} ", 1) for row in rows.split("\n")))
    assert _texts(folder, videos) == {"a.mp4": ('a cat, a "dog"; both',), "sub/c.mkv": ("Käse",)}


def test_an_empty_field_between_tabs_stays_one(folder, videos):
    _write(folder / "metadata.csv", "file_name\tnote\ttext\na.mp4\t\ta cat\n")
    assert _texts(folder, videos) == {"a.mp4": ("a cat",)}


@pytest.mark.parametrize("key", ["filename", "file_path", "filepath", "video_name", "File Name", "FileName"])
def test_further_names_of_the_column_of_files(folder, videos, key):
    _write(folder / "metadata.csv", f"{key},Caption\na.mp4,a cat\n")
    assert _texts(folder, videos) == {"a.mp4": ("a cat",)}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["a cat", "ein Käse", "猫"])
def test_utf16_without_its_mark_is_named(folder, videos, encoding, text):
    _write(folder / "metadata.csv", f"file_name,text\na.mp4,{text}\n".encode(encoding))
    assert "like UTF-16 without a byte order mark: save it as UTF-8" in _error(folder, videos)


@pytest.mark.parametrize("start", ["\n", " \n\n", "sep=;\r\n", '"sep=;"\n', "sep=;\n\n", ";;\n"])
def test_a_blank_line_and_that_of_excel_before_the_header_are_skipped(folder, videos, start):
    _write(folder / "metadata.csv", f"{start}file_name;text;a,b,c\na.mp4;a cat;\n")
    assert _texts(folder, videos) == {"a.mp4": ("a cat",)}
    path = _write(folder / "metadata.csv", f"{start}file_name;text\na.mp4;a cat;x\n")
    assert f"{path} row {start.count(chr(10)) + 2}: has 3 fields" in _error(folder, videos)


def test_excels_line_names_a_separator_that_would_not_be_found(folder, videos):
    _write(folder / "metadata.csv", "sep=|\nfile_name|text\na.mp4|a cat, asleep; on a mat\n")
    assert _texts(folder, videos) == {"a.mp4": ("a cat, asleep; on a mat",)}


class CountedText(str):
    """A text that counts the characters that are copied from it and its parts."""

    copied = 0

    def __getitem__(self, where):
        return self._count(super().__getitem__(where))

    def partition(self, separator):
        return tuple(map(self._count, super().partition(separator)))

    def _count(self, part):
        CountedText.copied += len(part)
        return CountedText(part)


def test_many_blank_lines_before_the_header_do_not_copy_the_text_for_each():
    text = CountedText(";\n" * 100 + "file_name;text\na.mp4;a cat\n" * 100)
    rest, number, _ = _skip_to_header(text, (",", ";"))
    assert (number, rest) == (100, str(text)[200:]) and CountedText.copied <= len(text) + 100
    assert _skip_to_header("\n;;", (",",)) == ("", 2, (",",)) == _skip_to_header("\n;;\n", (",",))
