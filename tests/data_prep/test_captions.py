import os
from pathlib import Path

import pytest

from mochi_tune.data_prep.captions import CaptionRules, Captions, apply_rules, drop_tags, find_orphans, load_captions
from mochi_tune.errors import DataError

RULES = CaptionRules()


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    (tmp_path / "sub").mkdir()
    # Reading captions never opens a video, so empty files are enough.
    return [tmp_path / "a.mp4", tmp_path / "b.take2.mov", tmp_path / "sub" / "c.mkv"]


def _write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _refusal(found: Captions, video: Path) -> str:
    """Returns why a video is refused; checks that it is one line in UTF-8."""
    assert found.refused.keys() == {video} and video not in found.texts
    found.refused[video].encode()
    assert "\n" not in found.refused[video] and "\0" not in found.refused[video]
    return found.refused[video]


def test_sidecars_are_stripped_and_joined_to_one_line(tmp_path, videos):
    _write(videos[0].with_name("a.txt"), "  a cat \r\n\n on a mat\n")
    _write(videos[1].with_name("b.take2.txt"), "\ufeffein Käse")
    _write(videos[2].with_name("c.txt"), "deep  down")
    _write(tmp_path / "notes.txt", "not a caption")
    assert load_captions(tmp_path, videos, RULES) == Captions(
        {videos[0]: ("a cat on a mat",), videos[1]: ("ein Käse",), videos[2]: ("deep  down",)}, {}, ()
    )


@pytest.mark.parametrize("name", ["a.TXT", "a.Txt", "a.caption", "a.CAPTION"])
def test_the_case_of_a_sidecars_suffix_is_ignored(tmp_path, videos, name):
    _write(tmp_path / name, "a cat")
    assert load_captions(tmp_path, videos, RULES).texts == {videos[0]: ("a cat",)}
    assert find_orphans(tmp_path, videos) == []


def test_of_several_sidecars_txt_in_lower_case_counts(tmp_path, videos):
    for name in ("a.caption", "a.TXT", "a.txt"):
        _write(tmp_path / name, name)
        assert load_captions(tmp_path, videos, RULES).texts == {videos[0]: (name,)}


def test_orphans_are_the_text_files_that_no_video_reads(tmp_path, videos):
    for name in ("a.txt", "b.take2.txt", "sub/c.txt", ".hidden.txt", "metadata.csv", "videos.txt", "prompts.txt"):
        _write(tmp_path / name, "words")
    assert find_orphans(tmp_path, videos) == []
    for name in ("sub/a.txt", "b.txt", "b.TXT", "A.txt", "z.caption", "sub/videos.txt"):
        _write(tmp_path / name, "words")
    _write(Path(os.fsdecode(bytes(tmp_path) + b"/c\xe4.txt")), "words")
    expected = ["A.txt", "b.TXT", "b.txt", "c\\udce4.txt", "sub/a.txt", "sub/videos.txt", "z.caption"]
    assert find_orphans(tmp_path, videos) == expected


def test_an_empty_caption_counts_as_absent(tmp_path, videos):
    _write(videos[0].with_name("a.txt"), " \n\n")
    _write(tmp_path / "metadata.csv", "file_name,caption\nb.take2.mov,  \n")
    rules = CaptionRules(prefix="nothing to put this before")
    assert load_captions(tmp_path, videos, rules) == Captions({}, {}, ())


def test_a_sidecar_wins_over_a_table_unless_it_is_empty(tmp_path, videos):
    _write(tmp_path / "metadata.csv", "file_name,text\na.mp4,from the table\nb.take2.mov,also\nsub/c.mkv,nul\0\n")
    _write(tmp_path / "a.txt", "from the sidecar")
    _write(tmp_path / "b.take2.txt", "")
    _write(tmp_path / "sub" / "c.txt", "whatever the table says")
    found = load_captions(tmp_path, videos, RULES)
    assert list(found.texts.values()) == [("from the sidecar",), ("also",), ("whatever the table says",)]
    assert not found.refused


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_sidecar_is_read_in_the_encoding_it_is_in(tmp_path, videos, encoding):
    _write(tmp_path / "a.txt", "Käse – “good”\r\nor not".encode(encoding))
    found = load_captions(tmp_path, videos, RULES)
    assert found.texts == {videos[0]: ("Käse – “good” or not",)} and not found.refused
    assert found.notes == (
        ("captions that are not UTF-8, read as cp1252; save them as UTF-8 if letters are wrong: a.txt",)
        if encoding == "cp1252"
        else ()
    )


def test_of_many_captions_in_cp1252_the_first_ones_are_named_and_the_rest_counted(tmp_path):
    videos = [tmp_path / f"{number:02}.mp4" for number in range(30)]
    for video in videos:
        _write(video.with_suffix(".txt"), "Käse".encode("cp1252"))
    [note] = load_captions(tmp_path, videos, RULES).notes
    assert "00.txt, 01.txt, " in note and note.endswith(", 09.txt and 20 more")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["is not UTF-8 (byte 0)"]),
        (b"K\xe4se \x02", ["is not UTF-8 (byte 1)"]),
        (b"a \x81 cat", ["is not UTF-8 (byte 2)"]),
        (b"\xff\xfea", ["is not UTF-8 (byte 2)"]),
        ("a\0nul", ["contains NUL characters"]),
        ("Käse".encode("utf-16-le"), ["is not UTF-8"]),
        ("cheese".encode("utf-16-be"), ["contains NUL characters"]),
        ("word " * 10_001, ["a.mp4: has a caption of 50004 characters, more than 50000"]),
    ],
)
def test_a_sidecar_that_is_no_caption_refuses_its_clip_alone(tmp_path, videos, content, words):
    path = _write(tmp_path / "a.txt", content)
    _write(tmp_path / "b.take2.txt", "fine")
    found = load_captions(tmp_path, videos, RULES)
    reason = _refusal(found, videos[0])
    assert str(path) in reason and all(word in reason for word in words)
    assert found.texts == {videos[1]: ("fine",)}


def test_a_huge_sidecar_is_not_read(tmp_path, videos):
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**40)
    assert "has 1048576 MiB, too much for a caption" in _refusal(load_captions(tmp_path, videos, RULES), videos[0])


def test_a_sidecar_that_cannot_be_read_refuses_its_clip_alone(tmp_path, videos, monkeypatch):
    _write(tmp_path / "a.txt", "x")

    def fail(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert "cannot be read (Permission denied)" in _refusal(load_captions(tmp_path, videos, RULES), videos[0])


def test_each_line_of_a_sidecar_may_be_a_caption(tmp_path, videos):
    _write(tmp_path / "a.txt", "a cat\r\n\n the cat \r\na cat\nthird\u2028line")
    _write(tmp_path / "metadata.csv", 'file_name,text\nb.take2.mov,"two\nlines"\n')
    found = load_captions(tmp_path, videos, CaptionRules(split="lines"))
    assert found.texts == {videos[0]: ("a cat", "the cat", "third line"), videos[1]: ("two lines",)}


@pytest.mark.parametrize(
    ("prefix", "suffix", "expected"),
    [
        ("sks", "", "sks a cat"),
        ("sks, ", ", film", "sks, a cat, film"),
        ("In sks style:\n", "film", "In sks style: a cat film"),
        ("", " film ", "a cat film"),
    ],
)
def test_prefix_and_suffix_are_joined_with_a_space(prefix, suffix, expected):
    assert apply_rules(["a cat", ""], CaptionRules(prefix=prefix, suffix=suffix), "a.mp4") == (expected,)


def test_tags_are_left_out_with_their_probability_and_the_first_is_kept():
    tags = [f"tag{number}" for number in range(400)]
    kept = drop_tags(", ".join(tags), 0.25, "key").split(", ")
    assert kept[0] == "tag0" and kept == [tag for tag in tags if tag in set(kept)]
    assert 270 < len(kept) < 330
    assert drop_tags("a ,b,, c", 0.0, "key") == "a ,b,, c"
    assert all(drop_tags("a, b, c", 0.999999, str(number)) == "a" for number in range(20))


def test_the_draw_of_tags_is_the_same_everywhere_and_keyed():
    # Computed with sha256. Another value would encode the captions of every cache again.
    assert drop_tags("a, b, c, d, e, f, g, h, i, j, k, l", 0.5, "0\0b.mp4\x000\x000") == "a, b, e, f, i, j, k, l"
    text = ", ".join("abcdefghijklmnopqrstuvwxyz")
    rules = CaptionRules(tag_dropout=0.5)
    base = apply_rules([text], rules, "a.mp4")
    assert base == apply_rules([text], rules, "a.mp4")
    assert base != apply_rules([text], rules, "b.mp4")
    assert base != apply_rules([text], CaptionRules(tag_dropout=0.5, seed=1), "a.mp4")
    assert base == apply_rules([text, "x"], rules, "a.mp4")[:1]
    assert len(apply_rules([text, f"{text}!"], rules, "a.mp4")) == 2


def test_variants_are_distinct_and_the_prefix_is_never_left_out():
    rules = CaptionRules(tag_dropout=0.5, variants=50, prefix="sks, ", suffix=", film")
    found = apply_rules(["a, b, c"], rules, "a.mp4")
    assert set(found) == {f"sks, {tags}, film" for tags in ("a", "a, b", "a, c", "a, b, c")} and len(found) == 4
    assert apply_rules(["one sentence"], rules, "a.mp4") == ("sks, one sentence, film",)


def test_a_broken_table_ends_the_run_even_where_a_sidecar_wins(tmp_path, videos):
    _write(tmp_path / "a.txt", "fine")
    _write(tmp_path / "metadata.jsonl", "{")
    with pytest.raises(DataError, match="row 1: is not JSON"):
        load_captions(tmp_path, videos, RULES)


def test_an_accent_is_the_same_however_a_system_writes_it(tmp_path):
    apart, composed = "e\u0301.mp4", "\u00e9.txt"
    _write(tmp_path / composed, "a cup")
    assert load_captions(tmp_path, [tmp_path / apart], RULES).texts == {tmp_path / apart: ("a cup",)}
    assert not find_orphans(tmp_path, [tmp_path / apart])
    # If both spellings exist, each video has its own file.
    _write(tmp_path / "e\u0301.txt", "a plate")
    assert load_captions(tmp_path, [tmp_path / apart], RULES).texts == {tmp_path / apart: ("a plate",)}
    for path in tmp_path.iterdir():
        path.unlink()
    _write(tmp_path / "metadata.csv", "file_name,text\n\u00e9.mp4,a bowl\n")
    assert load_captions(tmp_path, [tmp_path / apart], RULES).texts == {tmp_path / apart: ("a bowl",)}


@pytest.mark.parametrize("text", ["\u200b", "\ufeff\ufeff\n \u200b\u2060", " \u00a0\u00ad"])
def test_a_caption_of_invisible_characters_is_none(tmp_path, videos, text):
    _write(videos[0].with_name("a.txt"), text)
    assert load_captions(tmp_path, videos, RULES).texts == {}
    _write(videos[0].with_name("a.txt"), f"{text}a")
    assert load_captions(tmp_path, videos, RULES).texts.keys() == {videos[0]}


def test_captions_that_are_links_out_of_the_folder_are_told(tmp_path, videos):
    away = tmp_path.with_name(f"{tmp_path.name}_away")
    away.mkdir()
    (tmp_path / "a.txt").symlink_to(_write(away / "secret", "a key"))
    (tmp_path / "sub" / "c.txt").symlink_to(_write(tmp_path / "near.txt", "near"))
    # A video that is linked with its caption.
    videos[1].symlink_to(_write(away / "b.mov", ""))
    (tmp_path / "b.take2.txt").symlink_to(_write(away / "b.txt", "b"))
    found = load_captions(tmp_path, videos, RULES)
    assert len(found.texts) == 3
    assert found.notes == (
        f"captions that are links to files outside of {tmp_path}: {tmp_path / 'a.txt'} -> {away / 'secret'}",
    )
