import json
import re

import numpy as np
import pytest
import torch
from helpers_adapters import settings_of
from helpers_process import Disturbance, run
from helpers_renders import write_adapter, write_dora
from helpers_road import prepared, road
from helpers_rounding import assert_same_frames, rounding_share, share_of_error
from helpers_video import keeping_frames
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from mochi_tune import assets
from mochi_tune.adapters.files import load_adapter
from mochi_tune.adapters.lora import apply_lora, load_start_adapter
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.models.latents import to_vae_latents
from mochi_tune.models.vae_streaming import decode_chunks
from mochi_tune.recipes import sample as recipe
from mochi_tune.recipes.sample import main
from mochi_tune.recipes.verify import TOLERANCE
from mochi_tune.sampling.sampler import (
    Denoiser,
    SamplerSettings,
    draw_noise,
    euler_steps,
    linear_quadratic_sigmas,
    sample_latents,
)
from mochi_tune.sampling.video import read_frames
from mochi_tune.weights.folder import WeightsFolder

TINY = weights_folder(load_config("my_lora", ["model=tiny"]))


def sample(run_dir, *more):
    with keeping_frames(recipe, run_dir / "frames"):
        [video] = main(load_config("my_lora", road(run_dir, "sample.steps=3", "sample.prompt=a red ball", *more)))
    return video


def frames_of(run_dir, video):
    """Returns a video's frames as they were before their compression."""
    return torch.load(run_dir / "frames" / f"{video.stem}.pt", weights_only=True)


def latents_error(latents, guidance=6.0, dtype="fp32"):
    """How far the same latents by other sums may be from these.

    Two forwards are TOLERANCE of their largest number apart, see models/test_rounding.py; guidance makes that
    g + (g - 1) times as much, and the steps add up to one velocity, which is as large as the latents.
    """
    return (2 * guidance - 1) * TOLERANCE[dtype] * latents.abs().max()


def latents_of(video):
    return load_file(video.with_suffix(".safetensors"))["latents"]


def test_the_video_has_the_frames_and_its_settings_beside_it(tmp_path):
    video = sample(tmp_path, "seed=7", "sample.save_latents=true", "sample.num_frames=13")
    frames = read_frames(video)
    assert video.parent == tmp_path / "samples" and len(frames) == 13 and frames[0].size == (48, 32)
    import av

    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.average_rate == 30 and stream.frames == 13
    record = json.loads(video.with_suffix(".json").read_text())
    assert record["prompt"] == "a red ball" and record["seed"] == 7 and record["num_frames"] == 13
    assert record["sampler"] == {"steps": 3, "guidance": 6.0, "threshold": 0.025, "linear_steps": None}
    assert record["adapters"] == [] and len(record["noise_sha256"]) == 64
    assert record["weights"] == {p: WeightsFolder(TINY).fingerprint(p) for p in ("text_encoder", "dit", "decoder")}
    assert latents_of(video).shape == (1, 12, 3, 4, 6)


def test_the_latents_are_those_of_the_plain_loop(tmp_path):
    video = sample(tmp_path, "sample.save_latents=true", "sample.negative_prompt=a cat", "sample.guidance=3")
    encoder = WeightsFolder(TINY).load_text_encoder("cpu", torch.float32)
    prompt, negative = (
        (features[None], torch.ones(1, len(features), dtype=torch.bool))
        for features in encoder.encode(["a red ball", "a cat"])
    )
    states = euler_steps(
        Denoiser(WeightsFolder(TINY).load_dit("cpu", torch.float32), prompt, negative),
        draw_noise(0, 7, 32, 48),
        linear_quadratic_sigmas(3, 0.025),
        [3.0] * 3,
    )
    *_, latents = states
    assert (latents_of(video) - latents).abs().max() <= latents_error(latents, 3)


def test_nothing_is_ever_overwritten(tmp_path):
    first, second = sample(tmp_path), sample(tmp_path)
    assert first != second and first.exists() and second.exists()
    out = tmp_path / "mine.mp4"
    sample(tmp_path, f"sample.out={out}")
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="never overwritten"):
        sample(tmp_path, f"sample.out={out}")
    assert out.read_bytes() == before
    with pytest.raises(ConfigError, match=r"other\.avi has an unknown suffix: use \.mp4, \.webm"):
        sample(tmp_path, f"sample.out={tmp_path / 'other.avi'}")


def test_strength_0_is_the_base_exactly_and_strengths_scale(tmp_path):
    adapter = write_adapter(tmp_path / "a.safetensors")
    double = write_adapter(tmp_path / "b.safetensors", scale=2.0)
    base = latents_of(sample(tmp_path, "sample.save_latents=true"))
    latents = {}
    for path, strength in ((adapter, 0), (adapter, 1), (adapter, 2), (double, 1)):
        more = [f"sample.adapter={path}", f"sample.adapter_strength={strength}", "sample.save_latents=true"]
        latents[path.name, strength] = latents_of(sample(tmp_path, *more))
    assert torch.equal(latents["a.safetensors", 0], base)
    assert not torch.allclose(latents["a.safetensors", 1], base, atol=1e-2)
    twice = latents["b.safetensors", 1]
    assert (latents["a.safetensors", 2] - twice).abs().max() <= latents_error(twice)


def test_several_adapters_have_their_own_strengths(tmp_path):
    one, two = write_adapter(tmp_path / "a.safetensors", 1), write_adapter(tmp_path / "b.safetensors", 2)
    both = f"sample.adapter=[{one},{two}]"
    only_one = sample(tmp_path, f"sample.adapter={one}", "sample.save_latents=true")
    silenced = sample(tmp_path, both, "sample.adapter_strength=[1,0]", "sample.save_latents=true")
    together = sample(tmp_path, both, "sample.adapter_strength=[1,0.5]", "sample.save_latents=true")
    assert torch.equal(latents_of(silenced), latents_of(only_one))
    assert not torch.allclose(latents_of(together), latents_of(only_one), atol=1e-2)
    with pytest.raises(ConfigError, match="3 values for 2 adapters"):
        sample(tmp_path, both, "sample.adapter_strength=[1,1,1]")


def test_the_runs_own_adapter_is_used_by_itself(tmp_path):
    write_adapter(tmp_path / "adapter.safetensors")
    own = sample(tmp_path, "sample.save_latents=true")
    named = sample(tmp_path, f"sample.adapter={tmp_path / 'adapter.safetensors'}", "sample.save_latents=true")
    assert torch.equal(latents_of(own), latents_of(named))
    assert json.loads(own.with_suffix(".json").read_text())["adapters"][0]["strength"] == 1.0


def test_fast_settings(tmp_path):
    config = load_config("my_lora", road(tmp_path, "sample.prompt=x", "sample.preset=fast"))
    [video] = main(config)
    record = json.loads(video.with_suffix(".json").read_text())
    assert record["sampler"] == {"steps": 8, "guidance": 1.5, "threshold": 0.1, "linear_steps": 6}


def test_bf16_samples_near_fp32_with_an_fp32_state(tmp_path):
    adapter = write_adapter(tmp_path / "a.safetensors", scale=0.1)
    more = [f"sample.adapter={adapter}", "sample.save_latents=true", "sample.guidance=2"]
    exact = latents_of(sample(tmp_path, *more))
    rounded = latents_of(sample(tmp_path, *more, "model.dtype=bf16"))
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, rounded.bfloat16().float())
    assert (rounded - exact).abs().max() <= latents_error(exact, 2, "bf16")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    other = write_adapter(tmp_path / "a.safetensors", identity="0" * 64)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        sample(tmp_path, f"sample.adapter={other}")
    save_file({"blocks.0.attn.qkv_x.lora_A": torch.ones(2, 7), "blocks.0.attn.qkv_x.lora_B": torch.ones(9, 2)},
              tmp_path / "b.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match="was trained on another base"):
        sample(tmp_path, f"sample.adapter={tmp_path / 'b.safetensors'}")


@pytest.mark.parametrize("name", ["adapter.pt", "adapter.safetensors"])
def test_a_pickle_is_never_opened(tmp_path, name):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"x": Evil()}, tmp_path / name)
    done = run("sample", "conf=my_lora", *road(tmp_path), "prompt=x", f"adapter={tmp_path / name}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "safetensors" in done.stderr
    assert not (tmp_path / "pwned").exists()


def test_the_command_prints_the_path_and_takes_the_short_keys(tmp_path):
    adapter, out = write_adapter(tmp_path / "a.safetensors"), tmp_path / "new" / "x.mp4"
    done = run(
        "sample", "conf=my_lora", *road(tmp_path), "sample.steps=2", "prompt=a cat, (running)", "seed=3",
        f"adapter={adapter}", "adapter_strength=0.5", f"out={out}", "save_latents=true",
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == f"video: {out}"
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["prompt"] == "a cat, (running)" and record["seed"] == 3
    assert record["adapters"][0]["strength"] == 0.5 and out.with_suffix(".safetensors").exists()


def test_the_tiny_weights_are_what_their_recipe_makes(tmp_path):
    from mochi_tune.toy.make_tiny import main as make_tiny

    make_tiny(tmp_path)
    shipped = assets.FOLDER
    for name in ("dit", "encoder", "decoder", "text_encoder/model"):
        ours, theirs = (load_file(f"{folder}/{name}.safetensors") for folder in (tmp_path, f"{shipped}/tiny"))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            # Another instruction set draws normal numbers that are a few fp32 roundings off; the file's dtype rounds
            # some of these to its next number.
            step = torch.finfo(tensor.dtype).eps * theirs[key].abs() + 8 * torch.finfo(torch.float32).eps
            assert ((tensor.float() - theirs[key].float()).abs() <= step.float()).all(), key
    assert prepared().exists()


def test_base_and_lora_are_rendered_with_one_noise_side_by_side(tmp_path, monkeypatch):
    adapter = write_adapter(tmp_path / "a.safetensors", scale=0.3)
    named = [f"sample.adapter={adapter}", "sample.save_latents=true", "sample.num_frames=13"]
    chunks, plain = [], recipe.decoded_frames

    def noted(decoder, latents, *more):
        return (chunks.append(latents) or chunk for chunk in plain(decoder, latents, *more))

    monkeypatch.setattr(recipe, "decoded_frames", noted)
    both = sample(tmp_path, *named, "sample.compare=base")
    # One after the other: two decoders in turn would both hold their frames on the GPU.
    assert [chunks[0] is latents for latents in chunks] == [True] * 3 + [False] * 3
    alone = [sample(tmp_path, *named, f"sample.adapter_strength={strength}") for strength in (0, 1)]
    latents = load_file(both.with_suffix(".safetensors"))
    assert torch.equal(latents["base"], latents_of(alone[0]))
    adapted = latents_of(alone[1])
    assert (latents["latents"] - adapted).abs().max() <= latents_error(adapted)
    assert not torch.allclose(latents["latents"], latents["base"], atol=1e-2)
    assert len(read_frames(both)) == 13 and read_frames(both)[0].size == (96, 32)
    decoder = WeightsFolder(TINY).load_decoder("cpu", torch.float32)

    def decode(latents):
        return torch.cat([chunk[0] for chunk in decode_chunks(decoder, to_vae_latents(latents))])

    share = rounding_share(lambda: decode(adapted), list(decoder.parameters()))
    share += share_of_error(decode, adapted, latents_error(adapted).item())
    left, right = frames_of(tmp_path, both).chunk(2, dim=2)
    assert_same_frames(left, frames_of(tmp_path, alone[0]), share)
    assert_same_frames(right, frames_of(tmp_path, alone[1]), share)
    assert left.ne(right).float().mean() > 3 * share
    assert json.loads(both.with_suffix(".json").read_text())["side_by_side"] == ["base", "adapted"]
    with pytest.raises(ConfigError, match="compare=base has no adapter"):
        sample(tmp_path, f"sample.adapter={adapter}", "sample.compare=base", "sample.adapter_strength=0")


def test_rows_of_a_file_have_settings_of_their_own_and_t5_runs_once_a_prompt(tmp_path):
    rows = [
        {"prompt": "a red ball", "seed": 3, "num_frames": 13, "steps": 2},
        {"prompt": "a cat", "guidance": [4, 1, 1], "negative_prompt": "a red ball"},
        {"prompt": "a red ball", "height": 48, "width": 32, "sigmas": [1, 0.4, 0]},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = [f"sample.prompts={tmp_path / 'p.jsonl'}", f"sample.prompt_cache={tmp_path / 'cache'}"]
    config = load_config("my_lora", road(tmp_path, *more, "sample.steps=3", "sample.seeds=[1, 2]"))
    videos = list(main(config))
    records = [json.loads(video.with_suffix(".json").read_text()) for video in videos]
    assert [(r["prompt"], r["seed"], r["num_frames"], r["height"]) for r in records] == [
        ("a red ball", 3, 13, 32), ("a cat", 1, 7, 32), ("a cat", 2, 7, 32),
        ("a red ball", 1, 7, 48), ("a red ball", 2, 7, 48),
    ]  # fmt: skip
    assert [len(read_frames(video)) for video in videos] == [13, 7, 7, 7, 7]
    assert records[1]["sampler"]["guidance"] == [4, 1, 1] and records[3]["sampler"]["own_sigmas"] == [1, 0.4, 0]
    # Three distinct prompts, the empty one among them.
    assert len(list((tmp_path / "cache").iterdir())) == 3
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b", "step": 3}\n')
    done = run("sample", "conf=my_lora", *road(tmp_path), f"prompts={tmp_path / 'p.jsonl'}", "adapter=none")
    assert done.returncode == 2 and "p.jsonl row 3: step is not a key" in done.stderr


def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path):
    out = tmp_path / "videos" / "big.mp4"
    arguments = road(tmp_path, "sample.steps=2", "sample.num_frames=37")
    sample(tmp_path, *arguments[:-1])  # The prompt is cached, and the adapter found.
    # Files of 2000 bytes at most: what a full disk does, in the midst of writing.
    done = run(
        "sample", "conf=my_lora", *arguments, "prompt=a red ball", f"out={out}", "adapter=none",
        disturbance=Disturbance(file_bytes=2000),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"mochi-tune: {out}: File too large")
    assert list(out.parent.iterdir()) == []
    # A video of 500 bytes fits, its settings do not.
    out = out.with_name("small.webm")
    small = ["sample.num_frames=1", "sample.crf=60", "sample.metadata=false"]
    done = run(
        "sample", "conf=my_lora", *arguments, *small, "prompt=a red ball", f"out={out}", "adapter=none",
        disturbance=Disturbance(file_bytes=1000),
    )  # fmt: skip
    said = f"{out.with_suffix('.json')}: File too large; {out} is complete, but was written without its settings: "
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"mochi-tune: {said}"), done.stderr
    assert list(out.parent.iterdir()) == [out]


def test_compiled_blocks_render_the_same(tmp_path):
    adapter = write_adapter(tmp_path / "a.safetensors", scale=0.3)
    more = [f"sample.adapter={adapter}", "sample.save_latents=true", "sample.guidance=1"]
    counters["frames"].clear()
    plain, compiled = (latents_of(sample(tmp_path, *more, f"sample.compile={on}")) for on in ("false", "true"))
    assert counters["frames"]["ok"] > 0, "something was compiled"
    assert (plain - compiled).abs().max() <= latents_error(plain, 1)


def test_a_dora_renders_what_its_trained_model_does(tmp_path):
    dora, dit = write_dora(tmp_path / "a.safetensors"), WeightsFolder(TINY).load_dit("cpu", torch.float32)
    adapter = load_adapter(dora)
    settings = settings_of(list(adapter.layers), rank=2, alpha=4.0, dropout=0.5)
    apply_lora(dit, settings, seed=5, dora=True)
    load_start_adapter(dit, adapter.layers)
    features = WeightsFolder(TINY).load_text_encoder("cpu", torch.float32).encode(["a red ball", ""])
    noise, schedule = draw_noise(0, 7, 32, 48), SamplerSettings(3, 2.0, 0.025)
    *_, expected = sample_latents(dit.eval(), noise, *features, schedule)
    more = [f"sample.adapter={dora}", "sample.save_latents=true", "sample.guidance=2"]
    for how in ("sample.compile=false", "memory.dit=offload", "sample.compare=base"):
        video = sample(tmp_path, *more, how)
        assert (latents_of(video) - expected).abs().max() <= latents_error(expected, 2), how
    base = latents_of(sample(tmp_path, *more[1:]))
    assert torch.equal(load_file(video.with_suffix(".safetensors"))["base"], base)
    assert not torch.allclose(base, expected, atol=1e-2)


def test_tiles_are_an_option_that_leaves_the_latents_as_they_are(tmp_path):
    more = ["sample.save_latents=true", "sample.height=160", "sample.width=160"]
    whole, tiled = (sample(tmp_path, *more, *tiles) for tiles in ([], ["memory.tiles=[1, 2]"]))
    assert torch.equal(latents_of(whole), latents_of(tiled))
    ours, theirs = (frames_of(tmp_path, video).float() for video in (tiled, whole))
    assert ours.shape == theirs.shape and 0 < (ours - theirs).abs().mean() < 20
    with pytest.raises(ConfigError, match=r"memory.tiles=\[9, 1\] does not fit 160x160 pixels"):
        sample(tmp_path, *more, "memory.tiles=[9, 1]")


def test_the_tail_of_a_prompt_that_is_too_long_is_told_before_any_weight_is_read(tmp_path, capsys):
    tail = "and a small blue door in the wall"
    long = "ball " * 300 + tail
    rows = [{"prompt": "a cat", "negative_prompt": "bad " * 300 + tail}, {"prompt": long}, {"prompt": long, "seed": 3}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ["sample.steps=1", "sample.num_frames=1", f"sample.prompt_cache={tmp_path / 'cache'}"]
    config = load_config("my_lora", road(tmp_path, f"sample.prompts={tmp_path / 'p.jsonl'}", *more))
    for _ in range(2):
        # With features that an earlier run has cached it is told as well.
        list(main(config))
        told = [line for line in capsys.readouterr().err.splitlines() if "tokens" in line]
        assert len(told) == 2 and all(line.endswith(f"{tail}'") for line in told)
        assert told[0].startswith("the negative prompt 'bad bad") and told[1].startswith("the prompt 'ball ball")
        assert re.search(r"has \d+ tokens, and only 256 are used; this is lost: 'ball ball", told[1])
    (tmp_path / "cache").rename(tmp_path / "old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightsFolder, "load_text_encoder", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(main(config))
    assert capsys.readouterr().err.count("this is lost") == 2


def test_rows_end_at_a_newline_alone(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt":"raw\u2028sep"}\n', encoding="utf-8")
    more = [f"out={tmp_path / 'out'}", "sample.steps=1", "num_frames=1", "adapter=none"]
    done = run("sample", "conf=my_lora", *road(tmp_path), f"prompts={tmp_path / 'p.jsonl'}", *more)
    assert done.returncode == 0, done.stderr
    [record] = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json"))
    assert record["prompt"] == "raw\u2028sep"


def test_a_still_is_a_picture_of_its_own_pixels(tmp_path):
    still = sample(tmp_path, "sample.num_frames=1", "sample.save_latents=true")
    assert still.suffix == ".png"
    with Image.open(still) as picture:
        pixels = np.array(picture)
        assert json.loads(picture.info["Comment"])["seed"] == 0 and picture.info["Title"] == "a red ball"
    decoder = WeightsFolder(TINY).load_decoder("cpu", torch.float32)
    decode = lambda: next(decode_chunks(decoder, to_vae_latents(latents_of(still))))[0]  # noqa: E731
    assert_same_frames(torch.from_numpy(pixels)[None], decode(), rounding_share(decode, list(decoder.parameters())))
    assert torch.equal(torch.from_numpy(pixels)[None], frames_of(tmp_path, still))


def test_each_format_has_the_frames_and_says_its_settings_unless_told_not_to(tmp_path):
    (tmp_path / "secret").mkdir()
    adapter = write_adapter(tmp_path / "secret" / "a.safetensors", scale=0.1)
    more = ["sample.steps=1", f"sample.adapter={adapter}", "sample.negative_prompt=rain"]
    for name in ("webm", "png", "gif"):
        video = sample(tmp_path, *more, f"sample.format={name}")
        file = sorted(video.iterdir())[-1] if name == "png" else video
        assert video.suffix == ("" if name == "png" else f".{name}") and video.with_suffix(".json").exists()
        assert name != "png" or len(list(video.iterdir())) == 7
        content = file.read_bytes()
        assert all(text in content for text in (b"a red ball", b"rain", b"a.safetensors")) and b"secret" not in content
    silent = sample(tmp_path, *more, "sample.metadata=false", f"sample.out={tmp_path / 'x.mp4'}")
    assert b"a red ball" not in silent.read_bytes()
    record = json.loads(silent.with_suffix(".json").read_text())
    assert record["encoding"] == {"format": "mp4", "codec": "h264", "crf": 17}
