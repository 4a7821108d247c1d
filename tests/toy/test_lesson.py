import pytest
import torch
from helpers_process import run

from mochi_tune.data_prep.clips import Cut, decode_clip
from mochi_tune.errors import ConfigError, MochiTuneError
from mochi_tune.toy.lesson import asked_words, lesson_words, run_verb, write_lesson
from mochi_tune.toy.measure import see
from mochi_tune.toy.world import BACKGROUNDS, COLOURS, HEIGHT, NEW_WORD, NUM_FRAMES, SHAPES, WIDTH, split_words


def test_the_lesson_shows_every_word_and_asks_for_other_combinations():
    taught, others = lesson_words()
    assert len(set(taught)) == 24 and len(set(others)) == 30 and not set(taught) & set(others)
    assert {w.motion for w in taught + others} == {NEW_WORD}
    for kind, words in (("colour", COLOURS), ("shape", SHAPES), ("background", BACKGROUNDS)):
        assert {getattr(w, kind) for w in taught} == set(words)


def test_as_many_captions_are_asked_as_are_wanted():
    new, base = asked_words(50)
    assert len(new) == len(base) == 50 and len(set(base)) == 50
    assert set(new) == set(lesson_words()[1])
    assert not set(base) & set(split_words()[0])


def test_the_clips_survive_being_real_video_files(tmp_path):
    videos = write_lesson(tmp_path / "clips", seed=1)
    transform = Cut(NUM_FRAMES, HEIGHT, WIDTH)
    for path, words in zip(videos, lesson_words()[0], strict=True):
        assert path.with_suffix(".txt").read_text().strip() == words.caption
        clip = decode_clip(path, transform)
        assert clip.frames.shape == (NUM_FRAMES, HEIGHT, WIDTH, 3)
        assert see(torch.as_tensor(clip.frames)).shows(words)


def test_clips_and_captions_that_are_there_are_not_replaced(tmp_path):
    videos = write_lesson(tmp_path, seed=1)
    before = videos[3].read_bytes()
    for path in tmp_path.iterdir():
        path.unlink()
    for mine in (videos[3], videos[3].with_suffix(".txt")):
        mine.write_text("mine")
        done = run("toy", "clips", f"out={tmp_path}")
        assert done.returncode == 2 and f"{mine} exists already" in done.stderr and "another out=" in done.stderr
        assert mine.read_text() == "mine" and list(tmp_path.iterdir()) == [mine]
        mine.unlink()
    videos[3].write_text("half a video")
    write_lesson(tmp_path, seed=1, replaces=True)
    assert videos[3].read_bytes() == before and len(list(tmp_path.iterdir())) == 48


def test_a_folder_that_was_broken_off_is_not_told_to_be_used_as_it_is(tmp_path):
    videos = write_lesson(tmp_path, seed=1)
    with pytest.raises(ConfigError, match=r"exists already: use the clips of \S+ as they are, or another out=\.$"):
        write_lesson(tmp_path, seed=1)
    for path in [videos[-1].with_suffix(".txt"), *videos[9:]]:
        path.unlink()
    with pytest.raises(ConfigError) as caught:
        write_lesson(tmp_path, seed=1)
    rest = f"{tmp_path} is incomplete, it lacks 16 of 48 files: use another out=, or remove that folder."
    assert str(caught.value) == f"{videos[0]} exists already, and {rest}"


def test_a_verb_that_fails_ends_the_story_and_says_where_the_rest_is(tmp_path):
    log = tmp_path / "log.txt"
    with pytest.raises(MochiTuneError, match=r"`mochi-tune train` ended with exit code 2 \(.*no_such_file.*log\.txt"):
        run_verb("train", "conf=no_such_file", log=log)
    assert log.read_text().startswith("$ mochi-tune train conf=no_such_file\n")
