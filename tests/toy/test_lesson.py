import pytest
import torch

from mochi_tune.data_prep.clips import Cut, decode_clip
from mochi_tune.errors import MochiTuneError
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


def test_a_verb_that_fails_ends_the_story_and_says_where_the_rest_is(tmp_path):
    log = tmp_path / "log.txt"
    with pytest.raises(MochiTuneError, match=r"`mochi-tune train` ended with exit code 2 \(.*no_such_file.*log\.txt"):
        run_verb("train", "conf=no_such_file", log=log)
    assert log.read_text().startswith("$ mochi-tune train conf=no_such_file\n")
