"""`sample` from a video or an image, and with strengths by step and by block."""

import json

import av
import numpy as np
import pytest
import torch
from helpers_road import SIZES
from helpers_video import paint_frame, write_video
from PIL import Image
from safetensors.torch import load_file

from mochi_tune.adapters.files import Adapter, LoraLayer, load_adapter, save_adapter
from mochi_tune.adapters.lora import apply_adapter, linear_shapes
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.data_prep.clips import Cut, decode_clip
from mochi_tune.errors import ConfigError, DataError
from mochi_tune.files import file_sha256
from mochi_tune.models.latents import to_latents
from mochi_tune.models.vae import frames_to_pixels
from mochi_tune.recipes.sample import main
from mochi_tune.recipes.verify import TOLERANCE
from mochi_tune.sampling.sampler import Denoiser, draw_noise, euler_steps, linear_quadratic_sigmas
from mochi_tune.weights.folder import WeightsFolder

TINY = weights_folder(load_config("my_lora", ["model=tiny"]))
SIZE = (7, 32, 48)


def sample(run_dir, *more, memory="resident"):
    given = ["steps=4", "prompt=a red ball", "guidance=2", "save_latents=true", *more]
    settings = [*SIZES, f"run_dir={run_dir}", f"memory.dit={memory}", *(f"sample.{each}" for each in given)]
    videos = list(main(load_config("my_lora", [*settings, f"sample.prompt_cache={run_dir.parent / 'prompts'}"])))
    return videos[0] if len(videos) == 1 else videos


def latents_of(video, name="latents"):
    return load_file(video.with_suffix(".safetensors"))[name]


def record_of(video):
    return json.loads(video.with_suffix(".json").read_text())


def latents_error(latents, guidance=2.0):
    """As in test_sample: two forwards are TOLERANCE of their largest number apart, which guidance makes more."""
    return (2 * guidance - 1) * TOLERANCE["fp32"] * latents.abs().max()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A video that is larger, of another aspect and longer than what is rendered."""
    return write_video(tmp_path_factory.mktemp("start") / "clip.mp4", 9, width=96, height=80)


@pytest.fixture(scope="module")
def encoded(clip):
    """What the clip is to the DiT, by the encoder in one piece."""
    frames = decode_clip(clip, Cut(*SIZE)).frames
    encoder = WeightsFolder(TINY).load_encoder("cpu", torch.float32)
    with torch.no_grad():
        return to_latents(encoder(frames_to_pixels(frames[None]))[0])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: LoraLayer(torch.randn(2, i, generator=generator), torch.randn(o, 2, generator=generator) / 30, 4.0)
        for name, (o, i) in linear_shapes(WeightsFolder(TINY).dit_skeleton()).items()
    }
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    save_adapter(path, Adapter(layers, {"num_blocks": "2", "base_fingerprint": WeightsFolder(TINY).base_identity()}))
    return path


def by_hand(start, sigmas, dits):
    """Walks through noise levels with the model of each step."""
    features = WeightsFolder(TINY).load_text_encoder("cpu", torch.float32).encode(["a red ball", ""])
    prompt, negative = ((each[None], torch.ones(1, len(each), dtype=torch.bool)) for each in features)
    for i, dit in enumerate(dits):
        [start] = euler_steps(Denoiser(dit, prompt, negative), start, sigmas[i : i + 2], [2.0])
    return start


def test_strength_1_is_pure_noise_and_0_is_the_video(tmp_path, clip, encoded):
    plain = sample(tmp_path)
    one, zero = (sample(tmp_path, f"init_video={clip}", f"init_strength={strength}") for strength in (1, 0))
    assert torch.equal(latents_of(one), latents_of(plain))
    assert (latents_of(zero) - encoded).abs().max() <= TOLERANCE["fp32"] * encoded.abs().max()
    assert "init_video" not in record_of(plain) and "start_sigma" not in record_of(plain)["sampler"]
    origin = record_of(one)["init_video"]
    assert (origin["file"], origin["sha256"]) == (str(clip), file_sha256(clip))
    # 48x32 is a third of 96x64, which is cut out of 96x80.
    assert (origin["strength"], origin["steps"], origin["crop"]) == (1.0, 4, [0.0, 8.0, 96.0, 64.0])
    assert record_of(zero)["init_video"]["steps"] == 0 and set(record_of(zero)["seconds"]) > {"encode"}


def test_a_part_of_the_noise_goes_on_through_the_rest_of_the_schedule(tmp_path, clip, encoded):
    video = sample(tmp_path, f"init_video={clip}", "init_strength=0.9", "seeds=[3]")
    start = 0.1 * encoded + 0.9 * draw_noise(3, *SIZE)
    sigmas = [0.9, *(sigma for sigma in linear_quadratic_sigmas(4, 0.025) if sigma < 0.9)]
    expected = by_hand(start, sigmas, [WeightsFolder(TINY).load_dit("cpu", torch.float32)] * (len(sigmas) - 1))
    assert (latents_of(video) - expected).abs().max() <= latents_error(expected)
    assert record_of(video)["init_video"]["sigma"] == record_of(video)["sampler"]["start_sigma"] == 0.9
    assert record_of(video)["weights"]["encoder"] == WeightsFolder(TINY).fingerprint("encoder")
    with av.open(str(video)) as container:
        told = json.loads(container.metadata["comment"])["init_video"]
    assert told == record_of(video)["init_video"] | {"file": clip.name}


def test_an_image_is_shown_in_every_frame_and_a_small_one_is_enlarged(tmp_path, capsys):
    picture = paint_frame(5, 24, 16)
    Image.fromarray(picture).save(tmp_path / "still.png")
    video = sample(tmp_path, f"init_video={tmp_path / 'still.png'}", "init_strength=0")
    frames = decode_clip(tmp_path / "still.png", Cut(1, 32, 48, allow_upscale=True)).frames
    assert frames.shape == (1, 32, 48, 3) and np.abs(frames[0, ::2, ::2].numpy().astype(int) - picture).mean() < 20
    encoder = WeightsFolder(TINY).load_encoder("cpu", torch.float32)
    with torch.no_grad():
        expected = to_latents(encoder(frames_to_pixels(frames.repeat(7, 1, 1, 1)[None]))[0])
    assert (latents_of(video) - expected).abs().max() <= TOLERANCE["fp32"] * expected.abs().max()
    assert "still.png: an image, shown in 7 frames, enlarged to 48x32" in capsys.readouterr().err


def test_rows_have_starts_of_their_own_and_the_base_starts_alike(tmp_path, clip, adapter):
    last = {"init_video": str(clip), "init_strength": 0.3, "height": 48, "width": 32}
    rows = [{}, {"init_video": str(clip)}, last]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": "a red ball"} | row) for row in rows))
    videos = sample(tmp_path, f"prompts={tmp_path / 'p.jsonl'}", f"adapter={adapter}", "compare=base")
    origins = [record_of(video).get("init_video", {}).get("strength") for video in videos]
    assert origins == [None, 0.8, 0.3]
    base = sample(tmp_path, *(f"{key}={value}" for key, value in last.items()))
    assert torch.equal(latents_of(videos[2], "base"), latents_of(base))
    assert not torch.allclose(latents_of(videos[2]), latents_of(base), atol=1e-2)


def test_what_nothing_can_start_from_is_refused_before_a_weight_is_read(tmp_path, clip):
    (tmp_path / "text.mp4").write_text("no video")
    write_video(tmp_path / "hdr.mp4", 9, color_transfer=16)
    for given, kind, said in (
        (["init_strength=0.5"], ConfigError, "init_strength=0.5 does nothing without sample.init_video"),
        ([f"init_video={clip}", "init_strength=1.1"], ConfigError, "must be from 0 to 1"),
        ([f"init_video={tmp_path / 'no.mp4'}"], ConfigError, "does not exist: name a video or an image"),
        ([f"init_video={tmp_path}"], ConfigError, "is a folder: name a video or an image"),
        ([f"init_video={clip}", "num_frames=13"], ConfigError, "has 9 frames at 30 fps, not 13: use sample.num_frames"
         "=7, or a longer video"),
        ([f"init_video={tmp_path / 'text.mp4'}"], DataError, "cannot be read as a video"),
        ([f"init_video={tmp_path / 'hdr.mp4'}"], DataError, "is HDR, PQ.*set data.hdr=tonemap"),
    ):  # fmt: skip
        with pytest.raises(kind, match=said):
            sample(tmp_path / "run", *given)
    assert not (tmp_path / "run").exists()


# Strengths by step and by block


def test_a_schedule_of_ones_changes_no_bit_and_one_of_zeros_is_the_base(tmp_path, adapter):
    named, base = [f"adapter={adapter}", "adapter_strength=0.7"], sample(tmp_path)
    plain, ones, zeros = (
        sample(tmp_path, *named, *more)
        for more in ([], ["strength_schedule=[1,1]"], ["strength_schedule=[0]", "compare=base"])
    )
    assert torch.equal(latents_of(ones), latents_of(plain))
    assert torch.equal(latents_of(zeros), latents_of(base)) and torch.equal(latents_of(zeros, "base"), latents_of(base))
    assert not torch.allclose(latents_of(plain), latents_of(base), atol=1e-2)
    assert record_of(ones)["adapters"][0]["strength_schedule"] == [1.0, 1.0]
    assert set(record_of(plain)["adapters"][0]) == {"file", "sha256", "strength", "alpha", "alpha_source"}


@pytest.mark.parametrize("memory", ["resident", "offload"])
def test_a_schedule_gives_each_step_its_strength(tmp_path, adapter, memory):
    dits = {}
    for strength in (0.5, 0.25, -0.5):
        dits[strength] = WeightsFolder(TINY).load_dit("cpu", torch.float32)
        apply_adapter(dits[strength], load_adapter(adapter).layers, "adapter", strength)
    base = WeightsFolder(TINY).load_dit("cpu", torch.float32)
    expected = by_hand(
        draw_noise(0, *SIZE), linear_quadratic_sigmas(4, 0.025), [dits[0.5], base, dits[0.25], dits[-0.5]]
    )
    given = [f"adapter={adapter}", "adapter_strength=0.5", "strength_schedule=[1,0,0.5,-1]"]
    video = sample(tmp_path, *given, memory=memory)
    assert (latents_of(video) - expected).abs().max() <= latents_error(expected)


def test_blocks_have_strengths_of_their_own(tmp_path, adapter):
    layers = load_adapter(adapter).layers
    for name, layer in layers.items():
        layer.b *= 0.25 if name.startswith("blocks.0.") else 1.0
    save_adapter(tmp_path / "scaled.safetensors", Adapter(layers, load_adapter(adapter).metadata))
    expected = latents_of(sample(tmp_path, f"adapter={tmp_path / 'scaled.safetensors'}", "adapter_strength=0.5"))
    video = sample(tmp_path, f"adapter={adapter}", "adapter_strength=0.5", "block_strength={0: 0.25}")
    assert (latents_of(video) - expected).abs().max() <= latents_error(expected)
    assert not torch.allclose(expected, latents_of(sample(tmp_path, f"adapter={adapter}")), atol=1e-2)
    assert record_of(video)["adapters"][0]["block_strength"] == {"0": 0.25}
    silent = sample(tmp_path, f"adapter={adapter}", "block_strength={0-1: 0}")
    assert torch.equal(latents_of(silent), latents_of(sample(tmp_path)))
    with pytest.raises(ConfigError, match="'2' is not a block of the base: use a number from 0 to 1"):
        sample(tmp_path, f"adapter={adapter}", "block_strength={2: 0}")
    with pytest.raises(ConfigError, match="strength_schedule has 5 numbers for 4 steps"):
        sample(tmp_path, f"adapter={adapter}", "strength_schedule=[1,1,1,1,0]")
