"""A signal stops `sample` after its step; what is sampled is decoded and kept."""

import signal

import pytest
from helpers_road import road

from mochi_tune.config.load import load_config
from mochi_tune.recipes import sample as recipe
from mochi_tune.training import interrupts


def render(folder, monkeypatch, name, function):
    """Returns the videos of two requests, with a function of the recipe replaced, and the error that ended it."""
    monkeypatch.setattr(recipe, name, function)
    settings = ["sample.steps=2", "sample.guidance=2", "sample.num_frames=7", "sample.seeds=[0,1]"]
    videos = []
    with pytest.raises(KeyboardInterrupt) as caught:
        videos.extend(recipe.main(load_config("my_lora", road(folder, "sample.prompt=a red ball", *settings))))
    return videos, caught.value


def test_a_video_whose_last_step_is_under_way_is_kept(tmp_path, monkeypatch, capsys):
    def steps(*arguments):
        for number, state in enumerate(original(*arguments), 1):
            if number == 2:
                signal.raise_signal(signal.SIGINT)
            yield state

    original = recipe.sample_latents
    _, error = render(tmp_path, monkeypatch, "sample_latents", steps)
    assert len(list(tmp_path.rglob("*.mp4"))) == 1 and error.args == (130,)
    assert "stopped: 1 of 2 videos finished and kept" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["keep", "decoded_frames"])
def test_a_signal_after_the_last_step_is_the_exit_code_of_videos_that_are_all_written(tmp_path, monkeypatch, name):
    def signalled(*arguments):
        calls.append(name)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    calls, original = [], getattr(recipe, name)
    before = signal.getsignal(signal.SIGTERM)
    _, error = render(tmp_path, monkeypatch, name, signalled)
    assert len(list(tmp_path.rglob("*.mp4"))) == 2 and error.args == (143,)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_while_it_decodes_ends_it_and_leaves_the_latents(tmp_path, monkeypatch):
    def signalled(*_):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(interrupts, "REPEAT_SECONDS", -1.0)
    videos, error = render(tmp_path, monkeypatch, "decoded_frames", signalled)
    assert not videos and error.args == () and len(list(tmp_path.rglob("*.safetensors"))) == 2
