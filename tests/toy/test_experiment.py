import json
import signal

import pytest
import torch
from helpers_faults import STEP
from helpers_process import Disturbance, Program

from mochi_tune.errors import ConfigError
from mochi_tune.toy.arms import DEFAULT, Arm, run_names
from mochi_tune.toy.experiment import COLUMNS, draw_lesson, main, rounded_to_bf16, table, unevenness
from mochi_tune.toy.lesson import lesson_words
from mochi_tune.toy.world import draw_clips


def test_the_table_has_mean_and_spread_over_the_seeds():
    rows = [
        {"run": "default", "seed": seed, "parameters": 1000, **dict.fromkeys(COLUMNS, value)}
        for seed, value in enumerate((0.2, 0.4, 0.6))
    ]
    lines = table({"a": DEFAULT}, rows).splitlines()
    assert lines[2].startswith("| a | 1,000 | 3 | 0.4000 ± 0.2000 |")
    assert lines[2].count("0.400 ± 0.200") == len(COLUMNS) - 2
    # One seed has no standard deviation.
    assert table({"a": DEFAULT}, rows[:1]).splitlines()[2].startswith("| a | 1,000 | 1 | 0.2000 | 0.2000 | 0.200 |")


def test_a_motion_that_halts_now_and_then_is_uneven():
    clips = draw_clips(lesson_words()[0][:4], torch.Generator().manual_seed(0))
    stutter = clips[:, [0, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10]]
    assert unevenness(clips) < 0.05 and unevenness(stutter) > 0.3


def test_a_film_shows_the_same_motion_less_often():
    words = lesson_words()[0][:2]
    film, usual = (draw_clips(words, torch.Generator().manual_seed(0), fps).float() for fps in (24, 30))
    moved = [(clips[:, -1] - clips[:, 0]).abs().mean() for clips in (film, usual)]
    assert film.shape == usual.shape and moved[0] > 1.05 * moved[1]


def test_every_arm_is_run_once_and_results_are_kept(tmp_path):
    settings = ("train.steps=1", "train.validate_every=0", "sample.steps=2")
    printed = main("objective", 1, tmp_path, *settings, num_samples=1)
    results = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["run"] for row in results] == ["default", "objective/official", "objective/unnormalised"]
    # One step of the same size from the same start: the arms differ only in their objective.
    assert len({row["loss_new"] for row in results}) == 3
    for row in results:
        metrics = (tmp_path / f"{row['run']}_seed_0" / "metrics.jsonl").read_text().splitlines()
        assert len(metrics) == 1
    before = (tmp_path / "results.json").read_bytes()
    assert main("objective", 1, tmp_path, *settings, num_samples=1) == printed
    assert (tmp_path / "results.json").read_bytes() == before
    with pytest.raises(ConfigError, match="was made with other weights or settings: use another out="):
        main("objective", 1, tmp_path, "train.steps=2", "sample.steps=2", num_samples=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_experiment_that_is_stopped_ends_as_its_training_and_goes_on(tmp_path, number):
    out = tmp_path / "out"
    held = Disturbance(hold=STEP, hold_at=(3,))
    started = Program(["experiment", "what=objective", "seeds=1", f"out={out}"], tmp_path / "log", held)
    started.wait_until_held()
    started.send(number)
    started.release()
    assert started.wait() == 128 + number, started.text()
    assert started.err.splitlines()[-1] == f"{out / 'default_seed_0'} was stopped: the same command goes on from there"
    assert "Traceback" not in started.text() and (out / "default_seed_0" / "checkpoints").is_dir()


def test_an_unfinished_folder_of_clips_is_finished(tmp_path):
    unfinished = tmp_path / "videos.unfinished"
    unfinished.mkdir()
    for path in (left := draw_lesson(Arm(num_clips=1), tmp_path)).iterdir():
        (unfinished / path.name).write_text("half")
    videos = draw_lesson(DEFAULT, tmp_path)
    assert len(list(videos.iterdir())) == 48 and not unfinished.exists()
    assert all((videos / path.name).read_bytes() == path.read_bytes() for path in left.iterdir())


def test_an_arm_of_fewer_clips_gets_the_first_ones_as_they_are(tmp_path):
    few, all_of_them = (draw_lesson(arm, tmp_path) for arm in (Arm(num_clips=4), DEFAULT))
    first = {f"{w.colour}_{w.shape}_{w.motion}_{w.background}" for w in lesson_words()[0][:4]}
    assert {path.stem for path in few.iterdir()} == first
    # `prepare` reads all files in the folder of the clips.
    runs = {(tmp_path / f"{name}_seed_0").resolve() for name in run_names().values()}
    assert not any({few, all_of_them} & set(run.parents) for run in runs)
    assert len(list(few.iterdir())) == 8 and len(list(all_of_them.iterdir())) == 48
    for path in few.glob("*.mp4"):
        assert path.read_bytes() == (all_of_them / path.name).read_bytes()


def test_adapters_and_their_moments_are_rounded_after_each_step():
    weight = torch.nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)

    def step() -> list[torch.Tensor]:
        weight.square().sum().backward()
        optimizer.step()
        return [weight.data, *(x for x in optimizer.state[weight].values() if x.dim())]

    with rounded_to_bf16():
        assert [bool((x == x.bfloat16()).all()) for x in step()] == [True, True, True]
    assert not any((x == x.bfloat16()).all() for x in step())
