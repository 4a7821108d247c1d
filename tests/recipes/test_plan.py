"""`plan` says what a run will take, and of a card that is not here too."""

import re
from dataclasses import replace

import pytest
import torch
from helpers_cache import SETTINGS, encode, row_of
from helpers_process import run
from helpers_road import LORA, road
from torch.nn.attention import SDPBackend

from mochi_tune.cli.main import run as run_here
from mochi_tune.config.load import load_config
from mochi_tune.data.buckets import Bucket
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.errors import ConfigError
from mochi_tune.models.text_encoder import T5_DTYPES
from mochi_tune.parallel.forecast import CARDS, GIB, SPARE_BYTES, known_card
from mochi_tune.recipes import measuring, plan_measure
from mochi_tune.recipes.plan import count_clips, main
from mochi_tune.recipes.plan_measure import measure
from mochi_tune.recipes.sample_plan import check as check_sample
from mochi_tune.training import preflight

FULL = ["model.weights=nowhere", "data.videos=nowhere", "data.cache=nowhere"]


def test_a_plan_needs_neither_weights_nor_clips_nor_a_gpu():
    made = main(load_config("my_lora", FULL), "4090")
    assert made.num_tokens == 11130 and made.cache_bytes == 0 and "no clips in nowhere yet" in made.clips
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
    assert made.cache_bytes == 0 and f"no clips in {tmp_path} yet; sizes and times assume" in made.clips
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
    count, words, shares, _ = count_clips(load_config("my_lora", [*FULL, *sizes]))
    assert count == 8 and "in 2 buckets, the largest 7 frames of 32x48" in words
    assert shares == {small: 0.75, large: 0.25}
    mixed, longest = (main(load_config("my_lora", [*FULL, *more]), "4090") for more in (sizes, [*sizes[1:]]))
    assert mixed.run_seconds < longest.run_seconds and mixed.stages[0].held == longest.stages[0].held
    # The sizes of the settings may be larger than any clip.
    settings = replace(SETTINGS, transform={"version": 1, "buckets": {"": [[1, 32, 48], [7, 32, 48], [7, 64, 64]]}})
    with CacheWriter(tmp_path) as writer:
        writer.commit(rows, settings)
    sizes = [f"data.cache={tmp_path}", "data.buckets=[[1,32,48],[7,32,48],[7,64,64]]"]
    made = main(load_config("my_lora", [*FULL, *sizes]), "4090")
    assert "the largest 7 frames of 32x48" in made.clips and made.num_tokens == large.num_tokens
    assert made.run_seconds == mixed.run_seconds


def test_what_does_not_fit_has_a_way_out_that_fits():
    config = load_config("my_lora", [*FULL, "data.num_frames=163"])
    made = main(config, "3060")
    assert [line.partition(":")[0] for line in made.advice] == ["train", "prepare", "sample"]
    assert "use memory=12gb (" in made.advice[0] and made.advice[1] == "prepare: use memory.t5_dtype=bf16 or int8"
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


def test_a_real_step_is_measured_and_its_estimates_are_those_of_the_training(tmp_path, monkeypatch):
    config = load_config("my_lora", road(tmp_path, *LORA))
    # A GPU chooses by measured times; a CPU has one kernel, and runs it whatever comes first.
    monkeypatch.setattr(plan_measure, "choose_attention", lambda *_: "efficient")
    first_kernels = []

    def timed(step, *rest, **options):
        first_kernels.append(torch._C._get_sdp_priority_order()[0])
        return measuring.timed(step, *rest, **options)

    monkeypatch.setattr(plan_measure, "timed", timed)
    found = measure(config)
    assert found.seconds > 0 and found.first_seconds > 0 and found.peak_gib > 0
    assert first_kernels == [SDPBackend.EFFICIENT_ATTENTION.value] * 2
    # What `train` checks in its first seconds is what `plan` says.
    step, made = preflight.check(config, 1).step, main(config, "4090")
    [train] = [stage for stage in made.stages if stage.name == "train"]
    assert step.held(["none"] * 2)["adapter"] == train.held["adapter"] > 0
    assert "3 in " in made.clips and made.cache_bytes > 0


def test_the_command_prints_it(tmp_path):
    done = run("plan", "conf=my_lora", *road(tmp_path, *LORA), "card=4090")
    assert done.returncode == 0, done.stderr
    assert "4090 (not here: estimated), 23.6 GiB" in done.stdout
    # A tiny model's steps are too short for the estimates.
    assert done.stdout.endswith("\nmodel=tiny is too small for these estimates: they do not apply to it\n")
    assert "a step" not in done.stdout and "steps in about" not in done.stdout
    done = run("plan", "conf=my_lora", *FULL, "card=4090")
    assert done.stdout.endswith("\nevery stage fits as it is set\n") and "6.8 s a step" in done.stdout
    assert re.search(r"^24gb +as 80gb +10\.2 fits$", done.stdout, re.MULTILINE), done.stdout
    done = run("plan", "conf=my_lora", *FULL, "card=4090", "train.recompute=none")
    assert re.search(r"^16gb +not possible +3\.5 fits$", done.stdout, re.MULTILINE), done.stdout
    with pytest.raises(ConfigError, match="card_gib=0 does not fit: it takes a whole number of at least 1"):
        run_here(["plan", "conf=my_lora", "card=gt7", "card_gib=0"])
    for words in (["card=gt7"], ["data.num_frames=40", "card=4090"], ["card=gt7", "card_gib=much"]):
        done = run("plan", "conf=my_lora", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["memory.tiles=[0,2]"], "tiles"),
        (["memory.tiles=[2]"], "tiles"),
        (["memory=16gb", "train.recompute=none"], "train.recompute=none keeps the weights"),
        (["parallel=zero3", "parallel.num_processes=2", "data.damaged=quarantine"], "quarantine needs"),
    ],
)
def test_what_the_run_would_refuse_is_refused(more, said):
    with pytest.raises(ConfigError, match=said):
        main(load_config("my_lora", [*FULL, *more]), "4090")


def test_what_fits_is_what_a_run_may_have(tmp_path):
    """ZeRO-3 splits the weights and a DoRA measures them: neither goes with 8 bits, nor ZeRO with streaming."""
    for more, free_of in (
        (["parallel=zero3", "parallel.num_processes=4"], ("int8", "memory=16gb", "memory=12gb")),
        (["parallel=zero2", "parallel.num_processes=2"], ("memory=16gb", "memory=12gb")),
        (["lora.dora=true"], ("int8",)),
    ):
        made = main(load_config("my_lora", [*more, f"data.cache={tmp_path}"]), "3060", 0)
        said = next(line for line in made.advice if "this training needs" in line)
        assert "or train.batch_size" in said and not any(each in said for each in free_of), said
    with pytest.raises(ConfigError, match="zero3 shares a run among processes, but there is only one"):
        main(load_config("my_lora", ["parallel=zero3", f"data.cache={tmp_path}"]), "h100", 0)


def test_checkpoints_are_counted_where_one_is_saved(tmp_path):
    steps = load_config("my_lora", []).train
    every, each, none, best = (
        main(load_config("my_lora", [*more, f"data.cache={tmp_path}"]), "h100", 0).checkpoint_bytes
        for more in (
            [f"train.keep_every={steps.checkpoint_every}"], ["train.keep_every=1"], [], ["train.keep_best=true"]
        )
    )  # fmt: skip
    saved = -(-steps.steps // steps.checkpoint_every)
    one = (none - every) / (steps.keep_checkpoints - saved)
    assert every > none and one == pytest.approx(best - none) and every < one * (saved + 2)
    assert each - every == pytest.approx(one * (steps.steps - saved)), "each step is saved, and kept"


# What any optimizer goes with.
FREE = ["train.learning_rate=1", "train.schedule=constant"]


def test_checkpoints_are_as_large_as_the_optimizer_makes_them(tmp_path):
    def size(*more: str) -> int:
        return main(load_config("my_lora", [*FULL, *FREE, *more]), "h100").checkpoint_bytes

    adamw, last = size(), size("train.checkpoint_every=0")
    # Three checkpoints and one that is written, or one and one; and the finished adapter.
    assert (adamw, last) == (pytest.approx(13 / 7 * last), size("train.checkpoint_every=1000"))
    for optimizer, saved in (("muon", 2), ("prodigy", 5), ("schedule_free", 4), ("adamw_8bit", 1.57)):
        assert size(f"train.optimizer={optimizer}") == pytest.approx((4 * saved + 1) / 13 * adamw, rel=1e-3), optimizer
    assert size("train.ema_decay=0.99") == pytest.approx(17 / 13 * adamw)


@pytest.mark.parametrize(
    ("more", "gib", "advice"),
    [
        (["memory=12gb"], 8, ["prepare: use memory.t5_dtype=int8", "sample: use memory.t5_dtype=int8"]),
        (
            ["memory=12gb"],
            5,
            ["prepare: T5 takes 5.8 GiB even with", "sample: T5", "sample: use memory.tiles=["],
        ),
        (
            ["sample.height=4096", "sample.width=4096"],
            23,
            ["sample: lower sample.num_frames, sample.height or", "sample: use memory.tiles=["],
        ),
        (["sample.height=4096", "sample.width=4096"], 40, ["sample: use memory=24gb or memory=16gb or memory=auto"]),
        (["data.height=2048", "data.width=2048"], 30, ["train", "prepare: use clips of at most 31 frames, or lower"]),
    ],
)
def test_what_is_advised_fits(more, gib, advice):
    made = main(load_config("my_lora", [*FULL, *more]), "a card", gib)
    for said in advice:
        assert any(line.startswith(said) for line in made.advice), made.advice
    assert "every stage fits as it is set" not in made.advice
    for line in made.advice:
        for setting in [word for word in line.split() if word.startswith("memory") and line.startswith("sample: use")]:
            again = main(load_config("my_lora", [*FULL, *more, setting]), "a card", gib)
            stage = "sample: decode" if "tiles" in setting else "sample: denoise"
            assert next(s.total for s in again.stages if s.name == stage) <= gib * GIB, setting


def test_the_longest_clips_that_can_be_prepared_are_named():
    size = [*FULL, "data.height=2048", "data.width=2048"]
    fitting = [
        next(s.total for s in main(load_config("my_lora", [*size, frames]), "a card", 30).stages if "clips" in s.name)
        <= 30 * GIB
        for frames in ("data.num_frames=31", "data.num_frames=37")
    ]
    assert fitting == [True, False]


def test_every_stage_that_does_not_fit_is_advised_on():
    for gib in (2, 4, 6, 8, 10, 12, 16, 20, 24):
        for more in ([], ["memory=12gb"], ["memory=auto", "data.num_frames=163"], ["model.dtype=fp32"]):
            made = main(load_config("my_lora", [*FULL, *more]), "a card", gib)
            parts = {stage.name.partition(":")[0] for stage in made.stages if stage.total > gib * GIB}
            said = {line.partition(":")[0] for line in made.advice}
            assert said == (parts or {"every stage fits as it is set"}), (gib, more, made.advice)


def test_presets_that_a_training_refuses_are_not_offered():
    processes = "parallel.num_processes=2"
    for more in (["train.recompute=none"], ["parallel=zero2", processes], ["parallel=zero3", processes]):
        presets = main(load_config("my_lora", [*FULL, *more]), "4090").presets
        assert {name: train is not None for name, (train, _) in presets.items()} == {
            "80gb": True, "24gb": False, "16gb": False, "12gb": False,
        }, more  # fmt: skip
        assert all(sample is not None for _, sample in presets.values())


def denoise(more: list[str], card: str = "h100"):
    made = main(load_config("my_lora", [*FULL, *more]), card)
    return next(stage for stage in made.stages if stage.name == "sample: denoise"), made.advice


def test_a_step_without_guidance_is_one_pass():
    guided, _ = denoise(["sample.guidance=6"])
    assert denoise(["sample.guidance=1"])[0].seconds == pytest.approx(guided.seconds / 2)
    half, _ = denoise(["sample.steps=4", "sample.guidance=[6,6,1,1]"])
    assert half.seconds == pytest.approx(0.75 * guided.seconds)


def test_processes_share_a_video_as_sample_has_them():
    alone, advice = denoise(["memory.dit=shard"])
    assert any("memory.dit=shard splits the weights over the processes of one video" in line for line in advice)
    assert alone.held == denoise([])[0].held
    weights = []
    for count in (2, 4):
        stage, advice = denoise(["memory.dit=shard", f"parallel.num_processes={count}", f"parallel.context={count}"])
        assert advice == ["every stage fits as it is set"]
        # Each computes its tokens, too.
        assert stage.held["largest block"] == pytest.approx(alone.held["largest block"] / count, rel=1e-3)
        assert alone.seconds / count < stage.seconds < alone.seconds
        weights.append(stage.held["weights"])
    assert weights[1] < 0.6 * weights[0] < 0.6 * 0.6 * alone.held["weights"]
    _, advice = denoise(["parallel.num_processes=3", "parallel.data=2"])
    assert any(line.startswith("sample: parallel.data=2 is not possible with 3") for line in advice)


def test_sampling_in_fp8_is_planned_as_its_blocks_run():
    def largest_block(*more, card="4090"):
        return denoise(["memory=24gb", *more], card)[0].held["largest block"]

    compiled, eager = largest_block("sample.compile=true"), largest_block("sample.compile=false")
    assert eager > 2 * compiled
    # A GPU without fp8 does not round to it. By default, short videos are not compiled.
    assert largest_block("sample.compile=false", card="3090") == compiled
    assert largest_block() == eager and largest_block("sample.num_frames=163") < 2.6 * eager


def test_sample_and_plan_split_the_weights_over_as_many(tmp_path):
    weights = []
    for count in (2, 4):
        more = ["sample.prompt=a cat", "memory.dit=shard", f"parallel.num_processes={count}", "sample.adapter=none"]
        rendering = check_sample(load_config("my_lora", road(tmp_path, *more, f"parallel.context={count}")), count)
        weights.append(rendering.held("shard", 2)["weights"])
    assert weights[1] < weights[0]


@pytest.mark.parametrize("text", ["a cat", "a cat\n", "\na cat\n\n"])
def test_prompts_are_counted_as_sample_reads_them(tmp_path, text):
    (tmp_path / "p.txt").write_text(text)
    stage, advice = denoise([f"sample.prompts={tmp_path / 'p.txt'}", "parallel.num_processes=2", "memory.dit=shard"])
    assert advice == ["every stage fits as it is set"], "the two share the one video"
    assert stage.held == denoise(["parallel.num_processes=2", "memory.dit=shard"])[0].held


def test_several_captions_of_a_clip_are_counted(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").touch()
    (tmp_path / "a.txt").write_text("one, x, y\ntwo, x, y\n\nthree\n")

    def counted(*more: str) -> float:
        return count_clips(load_config("my_lora", [*FULL, f"data.videos={tmp_path}", *more]))[3]

    # A clip without a caption gets one.
    assert (counted(), counted("data.captions=lines")) == (1, 2)
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.mp4,one\nb.mp4,two\nb.mp4,three\n")
    assert counted() == 2
    (tmp_path / "metadata.csv").unlink()
    both = ["data.captions=lines", "data.caption_variants=50", "data.tag_dropout=0.5"]
    # Of x and y each subset is drawn, and "three" has no tags.
    assert counted(*both) == (4 + 4 + 1 + 1) / 2
    single, several = (
        main(load_config("my_lora", [*FULL, f"data.videos={tmp_path}", *more]), "h100").cache_bytes
        for more in ([], both)
    )
    assert several - single == 2 * 4 * 4 * 256 * 4096
    rows = [row_of(f"{i}.mp4", ("a", "b", "c")[: i + 1], f"sha{i}") for i in range(3)]
    with CacheWriter(tmp_path / "cache") as writer:
        encode(writer, rows)
        writer.commit(rows, SETTINGS)
    sizes = [f"data.{name}={size}" for name, size in (("num_frames", 7), ("height", 32), ("width", 48))]
    assert counted(f"data.cache={tmp_path / 'cache'}", *sizes) == 2


def test_one_frame_is_not_called_frames():
    assert "each has 1 frame of 480x848" in main(load_config("my_lora", [*FULL, "data.num_frames=1"]), "4090").clips


def test_ways_out_are_counted_as_the_table_counts_them():
    made = main(load_config("my_lora", [*FULL, "data.num_frames=163"]), "3060")
    train, _ = made.presets["12gb"]
    assert train is not None and f"memory=12gb ({train / GIB:.1f} GiB)" in made.advice[0]
    assert f"to spare {SPARE_BYTES / GIB:.1f}" in made.advice[0]
