import shutil

import av
import pytest
import torch
from helpers_cache import BUCKETS
from helpers_golden import GOLDEN, GRADIENT_TOLERANCE, TOLERANCE, relative_error
from helpers_road import LORA, prepared, read_rows, road, train
from helpers_rounding import assert_same_frames, rounding_error, rounding_share, share_of_error
from helpers_video import keeping_frames
from safetensors.torch import load_file, save_file

from mochi_tune.adapters.files import load_adapter
from mochi_tune.adapters.lora import apply_adapter
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.data.cache import open_cache
from mochi_tune.data.dataset import LatentDataset
from mochi_tune.errors import DataError, TrainingError
from mochi_tune.models.latents import to_vae_latents
from mochi_tune.models.vae_streaming import decode_chunks
from mochi_tune.recipes import sample
from mochi_tune.recipes.train_lora import main
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.sampling.sampler import draw_noise, sample_latents
from mochi_tune.training import evaluate
from mochi_tune.training.draws import KeyedDraws
from mochi_tune.training.preflight import check, check_text_width
from mochi_tune.weights.folder import WeightsFolder

# Long enough for a signal to come while it is under way.
LONG = ("train.steps=40", "train.batch_size=2", "train.accumulation_steps=2")


def without_time(run_dir) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key != "seconds"} for row in read_rows(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Forty steps without a stop, over three clips: the epochs end in the middle of steps."""
    run_dir = tmp_path_factory.mktemp("straight")
    assert train(run_dir, *LONG) == 0
    return run_dir


def test_the_run_folder_holds_what_scripts_rely_on(straight):
    assert sorted(path.name for path in straight.iterdir()) == [
        ".lock", "adapter.safetensors", "checkpoints", "clips.json", "config.yaml", "history.jsonl", "metrics.jsonl",
        "report.html", "samples", "validation.jsonl",
    ]  # fmt: skip
    rows = read_rows(straight / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert all({"step", "loss", "grad_norm", "lr", "seconds"} <= row.keys() for row in rows)
    assert load_config(str(straight / "config.yaml"), []).train.steps == 40


def test_the_last_step_is_saved_though_no_interval_falls_on_it(straight):
    assert [path.name for path in (straight / "checkpoints").iterdir()] == ["step_000040"]
    saved = straight / "checkpoints" / "step_000040" / "adapter.safetensors"
    assert saved.read_bytes() == (straight / "adapter.safetensors").read_bytes()


def test_the_adapter_is_fp32_has_every_layer_and_tells_of_itself(straight):
    from safetensors import safe_open

    tensors = load_file(straight / "adapter.safetensors")
    assert len(tensors) == 13 * 3 and all(t.dtype == torch.float32 for t in tensors.values())
    # Not the queries of the last block's text alone, every B has moved.
    assert all(t.any() for t in tensors.values())
    with safe_open(straight / "adapter.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["base_model"] == "tiny" and metadata["rank"] == "2" and metadata["step"] == "40"
    assert {"alpha", "targets", "config_hash", "base_fingerprint", "num_blocks"} <= metadata.keys()


def test_every_clip_comes_once_an_epoch(straight):
    clips = [clip for row in read_rows(straight / "metrics.jsonl") for clip in row["clips"]]
    assert len(clips) == 40 * 4
    for first in range(0, 160 - 3, 3):
        assert sorted(clips[first : first + 3]) == ["clip_0.mp4", "clip_1.mp4", "clip_2.mp4"]


def test_the_learning_rate_warms_up_and_falls_by_half_a_cosine(tmp_path):
    assert train(tmp_path, "train.steps=6", "train.warmup_steps=2", "train.learning_rate=1e-3") == 0
    rates = [row["lr"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 8.535534e-4, 5e-4, 1.464466e-4])


def test_a_finished_run_is_not_trained_again(straight):
    before = (straight / "adapter.safetensors").stat().st_mtime_ns
    assert train(straight, *LONG) == 0
    assert (straight / "adapter.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["train.learning_rate=1e-5", "lora.rank=4", "seed=3", "train.caption_dropout=0.5"])
def test_a_run_does_not_go_on_as_another(straight, change):
    more = [change if change.startswith("lora.rank") else "lora.rank=2", "lora=attention_mlp", "lora.dropout=0.1"]
    config = road(straight, *more, "train.steps=9", "train.batch_size=2", "train.accumulation_steps=2")
    if not change.startswith("lora.rank"):
        config.append(change)
    with pytest.raises(TrainingError) as error:
        main(load_config("my_lora", config))
    key, _ = change.split("=")
    assert f"{key} was" in str(error.value) and "run_dir=DIR" in str(error.value)


def test_another_seed_is_another_run(straight, tmp_path):
    assert train(tmp_path, *LONG, "seed=5") == 0
    ours, theirs = without_time(tmp_path), without_time(straight)
    assert all(a["loss"] != b["loss"] and a["sigmas"] != b["sigmas"] for a, b in zip(ours, theirs, strict=True))


def test_accumulated_batches_are_one_large_batch(tmp_path):
    plain = ["lora.rank=2", "train.steps=1"]
    moments = []
    for name, batch, accumulation in (("one", 4, 1), ("four", 1, 4)):
        more = [*plain, f"train.batch_size={batch}", f"train.accumulation_steps={accumulation}"]
        assert main(load_config("my_lora", road(tmp_path / name, *more))) == 0
        moments.append(load_file(tmp_path / name / "checkpoints" / "step_000001" / "optimizer.safetensors"))
    [one], [four] = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "four"))
    assert one["clips"] == four["clips"] and one["sigmas"] == four["sigmas"]
    assert one["loss"] == pytest.approx(four["loss"], rel=TOLERANCE)
    assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=GRADIENT_TOLERANCE)
    # After one step the first moment is a tenth of the gradient.
    gradients = {key: value for key, value in moments[0].items() if key.endswith("lora_B/exp_avg")}
    assert len(gradients) == 7
    for key, gradient in gradients.items():
        assert relative_error(moments[1][key], gradient) <= GRADIENT_TOLERANCE, key


def test_gradients_are_clipped_to_the_norm(tmp_path):
    """AdamW's first step hides the size of a gradient, but its moments do not."""
    for name, limit in (("free", "0"), ("clipped", "1e-4")):
        assert train(tmp_path / name, "train.steps=1", f"train.max_grad_norm={limit}") == 0
    states = [load_file(tmp_path / n / "checkpoints/step_000001/optimizer.safetensors") for n in ("free", "clipped")]
    norms = [sum(t.square().sum() for k, t in s.items() if k.endswith("exp_avg")).sqrt().item() * 10 for s in states]
    [row] = read_rows(tmp_path / "clipped" / "metrics.jsonl")
    assert row["grad_norm"] > 1e-3 and norms[0] == pytest.approx(row["grad_norm"], rel=1e-3)
    assert norms[1] == pytest.approx(1e-4, rel=1e-2)


def test_bf16_base_trains_fp32_adapters(tmp_path):
    assert train(tmp_path, "train.steps=3", "model.dtype=bf16", "train.warmup_steps=0") == 0
    checkpoint = tmp_path / "checkpoints" / "step_000003"
    for name in ("adapter", "optimizer"):
        tensors = load_file(checkpoint / f"{name}.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    moved = load_file(checkpoint / "adapter.safetensors")["blocks.0.attn.qkv_x.lora_B"]
    # Steps of 2e-4 and less on top of it would round away in bf16.
    assert moved.any() and not torch.equal(moved, moved.bfloat16().float())


def test_recomputed_activations_give_the_same_run_and_a_resume_may_change_them(straight, tmp_path, capsys):
    more = ["train.checkpoint_every=20", "train.keep_checkpoints=9"]
    arguments = [a for a in road(tmp_path, *LORA, *LONG, *more) if not a.startswith("train.recompute")]
    assert main(load_config("my_lora", [*arguments, "train.recompute=block"])) == 0
    assert without_time(tmp_path) == without_time(straight)
    shutil.rmtree(tmp_path / "checkpoints" / "step_000040")
    assert main(load_config("my_lora", arguments)) == 0
    assert "since step 20 train.recompute was block, is auto" in capsys.readouterr().out
    assert without_time(tmp_path) == without_time(straight)


def test_compiled_blocks_train_the_same_run_and_a_resume_may_leave_them_uncompiled(tmp_path, capsys):
    more = ["lora.dropout=0", "train.steps=3", "train.warmup_steps=0", "train.learning_rate=1e-3"]
    for name, on in (("plain", "false"), ("compiled", "true")):
        assert train(tmp_path / name, *more, "train.recompute=attention", f"train.compile={on}") == 0
    for ours, theirs in zip(without_time(tmp_path / "compiled"), without_time(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=GRADIENT_TOLERANCE)
    saved = [load_file(tmp_path / name / "adapter.safetensors").keys() for name in ("compiled", "plain")]
    assert saved[0] == saved[1], "no name tells that the blocks were compiled"
    capsys.readouterr()
    assert train(tmp_path / "compiled", *more, "train.steps=4", "train.compile=false", "resume=force") == 0
    assert "since step 3 train.compile was true, is false" in capsys.readouterr().out


def test_it_learns_the_clips(tmp_path):
    """On fixed clips, noise and sigmas the loss falls; it would not with the sign, the space or sigma turned round."""
    more = ["lora=attention_mlp", "train.steps=60", "train.learning_rate=1e-2", "train.warmup_steps=5"]
    more += ["train.validate_every=60", "train.validation_clips=3", "train.batch_size=3"]
    assert main(load_config("my_lora", road(tmp_path, *more))) == 0
    first, last = [row["validation_loss"] for row in read_rows(tmp_path / "validation.jsonl")]
    assert last < 0.92 * first


def test_eval_videos_are_those_of_the_sample_command(tmp_path):
    """Rendered with the live adapter, they are what `sample` renders from the saved one, and the base stays whole."""
    more = ["train.sample_every=2", "train.sample_prompts=[a red ball]", "sample.steps=3", "train.warmup_steps=0"]
    more += ["train.learning_rate=1e-2", "train.steps=2", "sample.negative_prompt=a cat", "sample.fps=24"]
    arguments = [a for a in road(tmp_path, *LORA, *more) if a != "train.sample_every=0"]
    config = load_config("my_lora", arguments)
    with keeping_frames(evaluate, tmp_path / "frames"):
        assert main(config) == 0
    videos = sorted(path.name for path in (tmp_path / "samples").glob("*.mp4"))
    assert videos == ["step_000000_prompt_0.mp4", "step_000002_prompt_0.mp4"]
    with av.open(str(tmp_path / "samples" / videos[1])) as container:
        assert container.streams.video[0].average_rate == 24

    assert config.sample.negative_prompt == "a cat"
    asked = [f"sample.out={tmp_path / 'again.mp4'}", "sample.compare=base", "sample.save_latents=true"]
    config = load_config("my_lora", [*arguments, "sample.prompt=a red ball", *asked])
    with keeping_frames(sample, tmp_path / "frames"):
        list(sample.main(config))
    frames = {path.stem: torch.load(path, weights_only=True) for path in (tmp_path / "frames").iterdir()}
    again, saved = frames["again"], load_file(tmp_path / "again.safetensors")
    # One has the adapter that was trained, the other one it from a file: what rounding may make of the same numbers.
    dit = WeightsFolder(weights_folder(config)).load_dit("cpu", torch.float32)
    apply_adapter(dit, load_adapter(tmp_path / "adapter.safetensors").layers, "adapter")
    text_encoder = WeightsFolder(weights_folder(config)).load_text_encoder("cpu", torch.float32)
    features = text_encoder.encode(["a red ball", "a cat"])
    noise, decoder = draw_noise(0, 7, 32, 48), WeightsFolder(weights_folder(config)).load_decoder("cpu", torch.float32)
    error = rounding_error(
        lambda: [*sample_latents(dit, noise, *features, sampler_settings(config.sample))][-1],
        [*dit.parameters(), noise],
    )

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([chunk[0] for chunk in decode_chunks(decoder, to_vae_latents(latents))])

    share = share_of_error(decode, saved["latents"], error)
    share += rounding_share(lambda: decode(saved["latents"]), list(decoder.parameters()))
    assert_same_frames(frames["step_000002_prompt_0"], again, share)
    # The base is sampled once a run; at step 0 the adapter, which changes nothing yet, is rendered beside it, the same.
    [kept] = (tmp_path / "base_latents").glob("base_prompt_0_*.safetensors")
    base = load_file(kept)["latents"]
    assert (base - saved["base"]).abs().max() <= error
    twice = torch.cat([decode(base)] * 2, dim=2)
    assert_same_frames(frames["step_000000_prompt_0"], twice, share)
    assert again.ne(twice).float().mean() > 10 * share, "the adapter does something"


def test_prompts_of_eval_videos_are_encoded_as_sample_encodes_them(tmp_path):
    """In the model's dtype: T5 in fp32 would need a larger GPU than the training does."""
    more = ["model.dtype=bf16", "train.sample_every=2", "train.sample_prompts=[a red ball]"]
    config = load_config("my_lora", road(tmp_path, *LORA, *more))
    features = evaluate.encode_eval_prompts(check(config, 1))
    weights = WeightsFolder(weights_folder(config))
    in_bf16, in_fp32 = (
        weights.load_text_encoder("cpu", dtype).encode(["a red ball", ""]) for dtype in (torch.bfloat16, torch.float32)
    )
    assert all(torch.equal(ours, its.float()) for ours, its in zip(features, in_bf16, strict=True))
    assert not torch.equal(features[0], in_fp32[0])


def test_draws_are_keyed_by_seed_step_and_sample():
    draws = KeyedDraws(0, 2, 2, 0.1, False)

    def draw(step, micro_batch, draws=draws):
        return draws.draw(step, micro_batch, (12, 2, 4, 6))

    once, again = draw(4, 1), draw(4, 1)
    for name in ("noise", "posterior_noise", "uniforms", "drops_caption"):
        assert torch.equal(getattr(once, name), getattr(again, name)), name
    assert not torch.equal(once.noise[0], once.noise[1]) and once.uniforms[0] != once.uniforms[1]
    others = [draw(5, 1), draw(4, 0), draw(4, 1, KeyedDraws(1, 2, 2, 0.1, False))]
    assert all(not torch.equal(other.noise, once.noise) for other in others)
    # However a step is shared, its samples are the same.
    alone = draw(4, 0, KeyedDraws(0, 4, 1, 0.1, False))
    assert torch.equal(alone.noise[once.rows], once.noise) and torch.equal(alone.uniforms, once.uniforms)
    uniforms = torch.cat([draws.uniforms(step) for step in range(300)])
    assert abs(uniforms.mean() - 0.5) < 0.05 and uniforms.min() < 0.02 and uniforms.max() > 0.98


def test_the_official_objective_is_there_by_name(tmp_path):
    assert train(tmp_path / "a", "train.steps=1") == 0
    assert train(tmp_path / "b", "train.steps=1", "train.objective=official") == 0
    losses = [read_rows(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in "ab"]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.5)


@pytest.mark.parametrize(
    ("setting", "text"),
    [("data.num_frames=13", "num_frames: the cache has 7, the config wants 13"), ("data.cache=nowhere", "no cache in")],
)
def test_a_cache_that_does_not_fit_is_refused(tmp_path, setting, text):
    with pytest.raises(DataError) as error:
        main(load_config("my_lora", [*road(tmp_path / "run"), setting]))
    assert text in str(error.value) and "mochi-tune prepare" in str(error.value)
    assert not (tmp_path / "run").exists(), "nothing is made before everything is checked"


def test_a_cache_of_another_model_is_refused(tmp_path):
    shutil.copytree(weights_folder(load_config("my_lora", ["model=tiny"])), tmp_path / "tiny")
    arguments = [*road(tmp_path / "run", *LORA, "train.steps=1"), f"model.weights={tmp_path / 'tiny'}"]
    assert main(load_config("my_lora", arguments)) == 0, "the same weights in another folder are the same model"

    encoder = load_file(tmp_path / "tiny" / "encoder.safetensors")
    encoder["output_proj.weight"][0, 0] += 1
    save_file(encoder, tmp_path / "tiny" / "encoder.safetensors")
    with pytest.raises(DataError, match="vae weights: the cache has"):
        main(load_config("my_lora", [*arguments, f"run_dir={tmp_path / 'other'}"]))

    # Without its encoders at hand, another DiT still shows by the width of the text that it takes.
    for name in ("encoder.safetensors", "text_encoder", "tokenizer"):
        path = tmp_path / "tiny" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("dit.safetensors", "dit_config.json"):
        shutil.copy(GOLDEN / name, tmp_path / "tiny" / name)
    assert main(load_config("my_lora", [*arguments, f"run_dir={tmp_path / 'golden'}"])) == 0, "the width is the same"
    dataset = LatentDataset(open_cache(prepared() / "cache", BUCKETS))
    check_text_width(dataset, 64)
    with pytest.raises(DataError, match="text features of width 64, but the DiT takes 4096"):
        check_text_width(dataset, 4096)
