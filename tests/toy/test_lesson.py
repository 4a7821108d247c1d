import pytest
import torch

from mochi_tune.data_prep.clips import ClipTransform, decode_clip
from mochi_tune.errors import MochiTuneError
from mochi_tune.toy.lesson import lesson_words, run_verb, write_lesson
from mochi_tune.toy.measure import see
from mochi_tune.toy.world import BACKGROUNDS, COLOURS, HEIGHT, MOTIONS, NEW_WORD, NUM_FRAMES, WIDTH


def test_the_lesson_shows_every_word_and_asks_for_other_combinations():
    taught, asked = lesson_words()
    assert len(set(taught)) == 24 and len(set(asked)) == 84 and not set(taught) & set(asked)
    assert {w.shape for w in taught + asked} == {NEW_WORD}
    for kind, words in (("colour", COLOURS), ("motion", MOTIONS), ("background", BACKGROUNDS)):
        assert {getattr(w, kind) for w in taught} == set(words)


def test_the_clips_survive_being_real_video_files(tmp_path):
    videos = write_lesson(tmp_path / "clips", seed=1)
    transform = ClipTransform(NUM_FRAMES, HEIGHT, WIDTH)
    for path, words in zip(videos, lesson_words()[0], strict=True):
        assert path.with_suffix(".txt").read_text().strip() == words.caption
        clip = decode_clip(path, transform)
        assert clip.frames.shape == (NUM_FRAMES, HEIGHT, WIDTH, 3)
        assert see(torch.as_tensor(clip.frames)).shows(words)


def test_a_verb_that_fails_ends_the_story():
    with pytest.raises(MochiTuneError, match=r"`mochi-tune train` ended with exit code 2"):
        run_verb("train", "conf=no_such_file")
