import json

import pytest
import torch

from mochi_tune.adapters.lora import linear_shapes, select_layers
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.errors import ConfigError
from mochi_tune.toy.experiment import COLUMNS, arms, main, table, unevenness
from mochi_tune.toy.lesson import lesson_words
from mochi_tune.toy.world import draw_clips
from mochi_tune.weights.folder import WeightsFolder


def test_the_layers_are_compared_at_equal_parameter_counts():
    shapes = linear_shapes(WeightsFolder(weights_folder(load_config("toy_lora", []))).dit_skeleton())
    counts = []
    for settings in arms()["layers"].values():
        lora = load_config("toy_lora", settings).lora
        counts.append(lora.rank * sum(sum(shapes[name]) for name in select_layers(shapes, lora.targets)))
        assert lora.alpha == 2 * lora.rank
    assert len(counts) == 2 and abs(counts[0] / counts[1] - 1) < 0.02, counts


def test_the_table_has_mean_and_spread_over_the_seeds():
    rows = [
        {"arm": "a", "seed": seed, "parameters": 1000, **dict.fromkeys(COLUMNS, value)}
        for seed, value in enumerate((0.2, 0.4, 0.6))
    ]
    lines = table({"a": []}, rows).splitlines()
    assert lines[2].startswith("| a | 1,000 | 3 | 0.4000 ± 0.2000 |")
    assert lines[2].count("0.400 ± 0.200") == len(COLUMNS) - 2


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
    results = json.loads((tmp_path / "objective.json").read_text())["rows"]
    assert [row["arm"] for row in results] == ["sampler", "official", "unnormalised"]
    # One step of the same size from the same start: the arms differ by their objective alone.
    losses = {row["arm"]: row["loss_new"] for row in results}
    assert len(set(losses.values())) == 3
    for arm in losses:
        metrics = (tmp_path / "objective" / f"{arm}_seed_0" / "metrics.jsonl").read_text().splitlines()
        assert len(metrics) == 1
    before = (tmp_path / "objective.json").read_bytes()
    assert main("objective", 1, tmp_path, *settings, num_samples=1) == printed
    assert (tmp_path / "objective.json").read_bytes() == before
    with pytest.raises(ConfigError, match="was made with other weights or settings: use another out="):
        main("objective", 1, tmp_path, "train.steps=2", "sample.steps=2", num_samples=1)
