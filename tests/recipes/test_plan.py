"""`plan` says what a run will take, and of a card that is not here too."""

from dataclasses import replace

import pytest
import torch
from helpers_cache import SETTINGS, encode, row_of
from helpers_process import run
from helpers_road import LORA, road

from mochi_tune.config.load import load_config
from mochi_tune.data.buckets import Bucket
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.errors import ConfigError
from mochi_tune.models.text_encoder import T5_DTYPES
from mochi_tune.parallel.forecast import CARDS, GIB, known_card
from mochi_tune.recipes.plan import count_clips, main, measure
from mochi_tune.training import preflight

FULL = ["model.weights=nowhere", "data.videos=nowhere", "data.cache=nowhere"]


def test_a_plan_needs_neither_weights_nor_clips_nor_a_gpu():
    made = main(load_config("my_lora", FULL), "4090")
    assert made.num_tokens == 11130 and made.cache_bytes == 0 and "none yet" in made.clips
    totals = {stage.name: stage.total / GIB for stage in made.stages}
    # See docs/benchmarks.md; a training keeps as much of the attention as fits.
    assert 22 < totals["train"] <= CARDS["4090"].gib and totals["prepare: captions"] == pytest.approx(19.0, abs=0.1)
    assert totals["sample: denoise"] == pytest.approx(15.7, abs=0.2)
    assert made.advice == ["every stage fits as it is set"]
    assert made.run_seconds == pytest.approx(1000 * next(s.seconds for s in made.stages if s.name == "train"))
    # The adapter, two moments of each number, and one checkpoint more while it is written.
    assert made.checkpoint_bytes > 4 * 3 * 71e6


def test_an_empty_folder_is_planned_for_as_none(tmp_path):
    """As `init` leaves it."""
    (tmp_path / "README.md").write_text("Put each clip here")
    made = main(load_config("my_lora", [*FULL, f"data.videos={tmp_path}"]), "4090")
    assert made.cache_bytes == 0 and f"none yet in {tmp_path}, so assumed" in made.clips
    (tmp_path / "still.png").touch()
    made = main(load_config("my_lora", [*FULL, f"data.videos={tmp_path}", "data.buckets=auto"]), "4090")
    assert f"1 in {tmp_path}, not prepared yet" in made.clips


def test_buckets_are_planned_for_by_the_largest_and_timed_by_their_shares(tmp_path):
    config = load_config("my_lora", [*FULL, "data.buckets=[[37,480,848],[1,480,848]]"])
    made = main(config, "4090")
    assert made.num_tokens == 11130 and "37 frames of 480x848" in made.clips
    small, large = (Bucket(frames, 32, 48) for frames in (1, 7))
    rows = [row_of(f"{i}.mp4", "a", f"sha{i}", bucket=small if i % 4 else large) for i in range(8)]
    settings = replace(SETTINGS, transform={"version": 1, "buckets": {"": [[1, 32, 48], [7, 32, 48]]}})
    with CacheWriter(tmp_path) as writer:
        encode(writer, rows)
        writer.commit(rows, settings)
    sizes = [f"data.cache={tmp_path}", "data.buckets=[[1,32,48],[7,32,48]]"]
    count, words, shares = count_clips(load_config("my_lora", [*FULL, *sizes]))
    assert count == 8 and "in 2 buckets, the largest 7 frames of 32x48" in words
    assert shares == {small: 0.75, large: 0.25}
    mixed, longest = (main(load_config("my_lora", [*FULL, *more]), "4090") for more in (sizes, [*sizes[1:]]))
    assert mixed.run_seconds < longest.run_seconds and mixed.stages[0].held == longest.stages[0].held


def test_what_does_not_fit_has_a_way_out_that_fits():
    config = load_config("my_lora", [*FULL, "data.num_frames=163"])
    made = main(config, "3060")
    assert [line.partition(":")[0] for line in made.advice] == ["train", "prepare", "sample"]
    assert "use memory=12gb (" in made.advice[0] and "memory.t5_dtype=bf16" in made.advice[1]
    assert {name: train is not None and train <= 11.8 * GIB for name, (train, _) in made.presets.items()} == {
        "80gb": False, "24gb": False, "16gb": False, "12gb": True,
    }  # fmt: skip
    configs = {name: load_config("my_lora", [*FULL, f"memory.t5_dtype={name}"]) for name in T5_DTYPES}
    held = {name: main(config, "3060").stages[0].held for name, config in configs.items()}
    assert held["bf16"]["weights"] == held["fp32"]["weights"] / 2
    # The embedding stays in bf16.
    assert held["bf16"]["weights"] / 2 < held["int8"]["weights"] < held["bf16"]["weights"] * 0.52
    with_way_out = main(load_config("my_lora", [*FULL, "data.num_frames=163", "memory=12gb"]), "3060")
    assert [line for line in with_way_out.advice if line.startswith(("train", "sample"))] == []


def test_a_card_is_known_by_what_the_driver_calls_it():
    cards = {"a100": "NVIDIA A100-SXM4-80GB", "a100-40": "NVIDIA A100-PCIE-40GB", "h100": "NVIDIA H100 80GB HBM3"}
    cards |= {"4090": "NVIDIA GeForce RTX 4090", "a6000": "NVIDIA RTX A6000", "l40s": "NVIDIA L40S"}
    assert all(known_card(name) is CARDS[card] for card, name in cards.items()) and known_card("NVIDIA T4") is None


def test_an_unknown_card_is_asked_for_its_memory():
    config = load_config("my_lora", FULL)
    with pytest.raises(ConfigError, match=r"card=gt7 is not known: use one of h200, .* as card_gib=24"):
        main(config, "gt7")
    made = main(config, "gt7", 24)
    # Its memory is enough.
    assert (
        made.gib == main(config, "", 24).gib == 24
        and made.run_seconds is None
        and all(stage.seconds is None for stage in made.stages)
    )
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="there is no GPU here: name one, as card=4090"):
            main(config)


def test_a_real_step_is_measured_and_foretold_sizes_are_those_of_the_training(tmp_path):
    config = load_config("my_lora", road(tmp_path, *LORA))
    found = measure(config)
    assert found.seconds > 0 and found.first_seconds > 0 and found.peak_gib > 0
    # What `train` checks in its first seconds is what `plan` says.
    step, made = preflight.check(config, 1).step, main(config, "4090")
    [train] = [stage for stage in made.stages if stage.name == "train"]
    assert step.held(["none"] * 2)["adapter"] == train.held["adapter"] > 0
    assert "3 in " in made.clips and made.cache_bytes > 0


def test_the_command_prints_it(tmp_path):
    done = run("plan", "conf=my_lora", *road(tmp_path, *LORA), "card=4090")
    assert done.returncode == 0, done.stderr
    assert "4090 (not here: foretold), 23.6 GiB" in done.stdout and "every stage fits" in done.stdout
    for words in (["card=gt7"], ["data.num_frames=40", "card=4090"], ["card=gt7", "card_gib=much"]):
        done = run("plan", "conf=my_lora", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["memory.tiles=[0,2]"], "tiles"),
        (["memory.tiles=[2]"], "tiles"),
        (["memory=16gb", "train.recompute=none"], "train.recompute=none keeps the weights"),
    ],
)
def test_what_the_run_would_refuse_is_refused(more, said):
    with pytest.raises(ConfigError, match=said):
        main(load_config("my_lora", [*FULL, *more]), "4090")


def test_what_fits_is_what_a_run_may_have(tmp_path):
    """ZeRO-3 splits the weights and a DoRA measures them: neither goes with 8 bits, nor the former with streaming."""
    for more, free_of in (
        (["parallel=zero3", "parallel.num_processes=4"], ("int8", "memory=16gb", "memory=12gb")),
        (["lora.dora=true"], ("int8",)),
    ):
        made = main(load_config("my_lora", [*more, f"data.cache={tmp_path}"]), "3060", 0)
        said = next(line for line in made.advice if "this training needs" in line)
        assert "or train.batch_size" in said and not any(each in said for each in free_of), said
    with pytest.raises(ConfigError, match="zero3 shares a run among processes, and there is one"):
        main(load_config("my_lora", ["parallel=zero3", f"data.cache={tmp_path}"]), "h100", 0)


def test_checkpoints_are_counted_where_one_is_saved(tmp_path):
    every, none, best = (
        main(load_config("my_lora", [*more, f"data.cache={tmp_path}"]), "h100", 0).checkpoint_bytes
        for more in (["train.keep_every=1"], [], ["train.keep_best=true"])
    )
    steps = load_config("my_lora", []).train
    saved = -(-steps.steps // steps.checkpoint_every)
    one = (none - every) / (steps.keep_checkpoints - saved)
    assert every > none and one == pytest.approx(best - none) and every < one * (saved + 2)
