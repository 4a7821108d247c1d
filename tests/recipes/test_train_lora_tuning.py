"""What a fine-tuner tunes, in whole runs: each choice does something, is saved, and goes on bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_faults import assert_same_end, rows_of
from helpers_golden import TOLERANCE
from helpers_road import CAPTIONS, SIZES, read_rows, train
from helpers_video import write_video
from safetensors.torch import load_file

from mochi_tune.adapters.files import load_adapter
from mochi_tune.config.load import load_config
from mochi_tune.data_prep.prepare import main as prepare
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.training.draws import KeyedDraws
from mochi_tune.training.objective import sigmas_from_uniforms

OPTIMIZERS = {
    "adamw": [], "adamw_8bit": [], "adafactor": [], "muon": [], "prodigy": ["train.learning_rate=1"],
    "schedule_free": ["train.schedule=constant"],
}  # fmt: skip


def stopped_and_gone_on(folder: Path, *settings: str) -> None:
    """Trains six steps straight and, in another folder, three and three; compares all that they come to."""
    settings = ("train.checkpoint_every=3", "train.validate_every=3", "train.validation_clips=1", *settings)
    assert train(folder / "straight", "train.steps=6", *settings) == 0
    shutil.copytree(folder / "straight", folder / "again")
    shutil.rmtree(folder / "again/checkpoints/step_000006")
    assert train(folder / "again", "train.steps=6", *settings) == 0
    assert_same_end(folder / "again", folder / "straight")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_goes_on_bit_for_bit(tmp_path, name):
    stopped_and_gone_on(tmp_path, f"train.optimizer={name}", "train.warmup_steps=1", *OPTIMIZERS[name])
    adapter = load_file(tmp_path / "straight/adapter.safetensors")
    assert all(tensor.any() for key, tensor in adapter.items() if key.endswith("lora_B"))
    [checkpoint] = (tmp_path / "straight/checkpoints").glob("step_000006")
    trained = load_file(checkpoint / "adapter.safetensors")
    is_other = (checkpoint / "averaged.safetensors").exists()
    assert is_other == (name == "schedule_free"), "what it gives out is not what it trains"
    assert is_other or all(torch.equal(adapter[key], trained[key]) for key in adapter)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.schedule=wsd", "train.decay_share=0.5", "train.learning_rate_b_ratio=8"],
        ["train.sigma_distribution=logit_normal", "train.sigma_stratified=true", "train.accumulation_steps=3"],
        ["train.sigma_distribution=shifted", "train.sigma_shift=3", "train.loss_weighting=cosmap"],
        ["lora.dora=true", "lora.rslora=true", "train.ema_decay=0.9"],
        ["lora.rank_pattern={'blocks\\.0\\..*': 4}", "lora.dropout_pattern={'blocks\\.1\\..*': 0.3}"],
    ],
    ids=["schedule", "stratified", "shifted", "dora", "patterns"],
)  # fmt: skip
def test_every_choice_goes_on_bit_for_bit(tmp_path, settings):
    stopped_and_gone_on(tmp_path, "train.warmup_steps=0", *settings)


def test_the_average_is_what_is_validated_rendered_and_given_out(tmp_path):
    settings = ["train.steps=6", "train.learning_rate=1e-2", "train.warmup_steps=0", "train.checkpoint_every=1"]
    settings += ["train.validate_every=6", "train.validation_clips=2", "train.keep_checkpoints=9"]
    for name, more in (("plain", []), ("averaged", ["train.ema_decay=0.999"])):
        assert train(tmp_path / name, *settings, *more) == 0
    plain, averaged = (load_file(tmp_path / name / "adapter.safetensors") for name in ("plain", "averaged"))
    steps = [load_file(tmp_path / f"plain/checkpoints/step_00000{n}/adapter.safetensors") for n in range(1, 7)]
    for name, tensor in averaged.items():
        # Early on the decay is (1 + step) / (10 + step); B begins at 0.
        expected = torch.zeros_like(tensor) if name.endswith("lora_B") else None
        if expected is not None:
            for number, step in enumerate(steps, 1):
                decay = (1 + number) / (10 + number)
                expected = decay * expected + (1 - decay) * step[name]
            # Twice six roundings of numbers of up to 6 steps of 1e-2.
            assert (tensor - expected).abs().max() <= 12 * 2**-23 * 0.06, name
    saved = load_file(tmp_path / "averaged/checkpoints/step_000006/adapter.safetensors")
    assert all(torch.equal(saved[name], plain[name]) for name in plain), "training does not feel it"
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("plain", "averaged")]
    assert losses[0] == losses[1]
    losses = [rows_of(tmp_path / name, "validation") for name in ("plain", "averaged")]
    assert losses[0][0] == losses[1][0] and losses[0][1]["validation_loss"] != losses[1][1]["validation_loss"]
    # What is given out is what was validated: begun with it, another run validates the same.
    begun = [*settings[1:3], f"lora.init_from={tmp_path / 'averaged/adapter.safetensors'}", *settings[4:]]
    assert train(tmp_path / "begun", "train.steps=1", *begun) == 0
    first = rows_of(tmp_path / "begun", "validation")[0]["validation_loss"]
    assert first == pytest.approx(losses[1][1]["validation_loss"], rel=TOLERANCE)


@pytest.mark.parametrize("to", ["native", "diffusers", "comfyui"])
def test_a_run_begins_with_an_adapter_of_any_format(tmp_path, to, capsys):
    from mochi_tune.recipes.export import main as export

    settings = [
        "train.validate_every=4",
        "train.validation_clips=2",
        "train.learning_rate=1e-2",
        "train.warmup_steps=0",
    ]
    settings += ["lora=attention", "lora.rank=6"]
    assert train(tmp_path / "first", "train.steps=4", *settings) == 0
    file = tmp_path / "first/adapter.safetensors"
    if to != "native":
        export(file, to, tmp_path / "exported" / "exported.safetensors")
        file = tmp_path / "exported"
    # Fused again, the parts of a split file have three times the rank.
    more = ["lora.rank=18"] if to == "diffusers" else []
    assert train(tmp_path / "second", "train.steps=2", *settings, *more, f"lora.init_from={file}") == 0
    assert f"starts from adapter {file}" in capsys.readouterr().out
    ends = [rows_of(tmp_path / "first", "validation")[-1], rows_of(tmp_path / "second", "validation")[0]]
    assert ends[0]["step"] == 4 and ends[1]["step"] == 0
    assert ends[1]["validation_loss"] == pytest.approx(ends[0]["validation_loss"], rel=TOLERANCE)


def test_what_an_adapter_to_begin_with_does_not_fit_is_refused_before_the_run_folder_is_made(tmp_path):
    assert train(tmp_path / "first", "train.steps=1", "lora.rank=4") == 0
    begin = f"lora.init_from={tmp_path / 'first/adapter.safetensors'}"
    with pytest.raises(ConfigError, match=r"lora\.rank"):
        train(tmp_path / "second", "train.steps=1", begin, "lora.rank=2")
    with pytest.raises(CheckpointError, match="does not exist"):
        train(tmp_path / "second", "train.steps=1", "lora.init_from=nowhere.safetensors")
    assert not (tmp_path / "second").exists()


def test_stratified_sigmas_are_spread_over_each_steps_samples():
    draws = KeyedDraws(seed=0, batch_size=2, num_micro_batches=4, caption_dropout=0.0, stratified=True)
    for distribution, middle in (("uniform", 0.5), ("shifted", 0.75)):
        orders = set()
        for step in range(1, 40):
            sigmas = sigmas_from_uniforms(draws.uniforms(step), distribution, shift=3.0)
            uniforms = sigmas if distribution == "uniform" else sigmas / (3 - 2 * sigmas)
            assert sorted((uniforms * 8).floor().tolist()) == list(range(8)), "one in each eighth"
            assert (sigmas < middle).sum() == 4
            orders.add(tuple(sigmas.argsort().tolist()))
        assert len(orders) > 30, "another sample gets the noise each time"


@pytest.fixture(scope="module")
def twelve(tmp_path_factory) -> list[str]:
    """Settings of a cache of twelve clips: enough to hold some out."""
    folder = tmp_path_factory.mktemp("twelve")
    (folder / "videos").mkdir()
    for number in range(12):
        write_video(folder / "videos" / f"clip_{number:02}.mp4", 8, width=48, height=32, first_number=7 * number)
        (folder / "videos" / f"clip_{number:02}.txt").write_text(CAPTIONS[number % 3])
    paths = [f"data.videos={folder / 'videos'}", f"data.cache={folder / 'cache'}"]
    assert prepare(load_config("my_lora", [*SIZES, *paths])) == 0
    return paths


def test_validation_is_by_noise_level_on_clips_that_are_not_trained_on(twelve, tmp_path):
    settings = ["train.steps=30", "train.batch_size=2", "train.validate_every=15", "train.validation_clips=9", *twelve]
    assert train(tmp_path / "run", *settings) == 0
    rows = rows_of(tmp_path / "run", "validation")
    assert [row["step"] for row in rows] == [0, 15, 30] and all(row["held_out"] for row in rows)
    for row in rows:
        assert list(row["bins"]) == ["0.125", "0.375", "0.625", "0.875"]
        assert row["validation_loss"] == pytest.approx(sum(row["bins"].values()) / 4)
    taught = {clip for row in rows_of(tmp_path / "run") for clip in row["clips"]}
    assert len(taught) == 10, "a fifth at most is held out, and the others are all trained on"
    # What was drawn, by tenths of the noise levels.
    drawn = [sigma for row in rows_of(tmp_path / "run") for sigma in row["sigmas"]]
    assert rows[-1]["sigmas_drawn"] == [sum(int(sigma * 10) == tenth for sigma in drawn) for tenth in range(10)]
    assert sum(rows[1]["sigmas_drawn"]) == 30 and rows[0]["sigmas_drawn"] == [0] * 10


def test_how_many_are_held_out_decides_what_is_learnt(twelve, tmp_path, capsys):
    from mochi_tune.errors import TrainingError

    settings = ["train.validate_every=9", *twelve]
    assert train(tmp_path, "train.steps=2", "train.validation_clips=1", *settings) == 0
    assert "held out for validation: 1 of 12 clips" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="held_out was 1, is 2"):
        train(tmp_path, "train.steps=4", "train.validation_clips=2", *settings)
    with pytest.raises(TrainingError, match="held_out was 1, is 0"):
        train(tmp_path, "train.steps=4", "train.validation_clips=1", *twelve)


def test_without_validation_no_clip_is_held_out(twelve, tmp_path):
    assert train(tmp_path, "train.steps=6", "train.batch_size=2", *twelve) == 0
    assert len({clip for row in rows_of(tmp_path) for clip in row["clips"]}) == 12


def test_too_few_clips_are_all_trained_on_and_that_is_said(tmp_path, capsys):
    assert train(tmp_path, "train.steps=3", "train.validate_every=3", "train.validation_clips=2") == 0
    assert "no clip of 3 can be held out" in capsys.readouterr().out
    assert not any(row["held_out"] for row in read_rows(tmp_path / "validation.jsonl"))
    assert {clip for row in rows_of(tmp_path) for clip in row["clips"]} == {f"clip_{n}.mp4" for n in range(3)}


def test_the_file_tells_how_it_was_made(tmp_path):
    more = ["train.steps=1", "lora.rslora=true", "lora.rank=4", "lora.alpha=8"]
    assert train(tmp_path, *more) == 0
    adapter = load_adapter(tmp_path / "adapter.safetensors")
    assert adapter.metadata["rank"] == "4" and adapter.metadata["alpha"] == "8" and "rslora" in adapter.metadata
    [history] = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    about = {
        "torch": str(torch.__version__),
        "processes": 1,
        "strategy": "data",
        "device": f"cpu, {torch.get_num_threads()} threads",
    }
    assert history.pop("date").endswith("+00:00") and len(history.pop("learnt")) == 12
    assert len(history.pop("order")) == 64, "a sha256"
    assert history == {"from_step": 0, "resume_from": None, "changed": [], "notes": [], **about}
