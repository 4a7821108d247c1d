"""What `sample` chooses by itself before it reads a weight."""

import pytest
import torch
from helpers_road import road

from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.errors import ConfigError
from mochi_tune.models.dit import DiTConfig
from mochi_tune.models.vae import DecoderConfig
from mochi_tune.parallel.forecast import GIB
from mochi_tune.parallel.forecast_sampling import sampling_held
from mochi_tune.parallel.memory import PRECISIONS, RESIDENCIES
from mochi_tune.recipes import sample as recipe
from mochi_tune.recipes import sample_plan
from mochi_tune.recipes.sample_plan import pays_to_compile
from mochi_tune.sampling.prompt_cache import PromptCache
from mochi_tune.sampling.requests import read_requests
from mochi_tune.training.evaluate import encode_eval_prompts
from mochi_tune.training.preflight import check
from mochi_tune.weights.folder import WeightsFolder


def test_blocks_are_compiled_where_the_steps_pay_for_it(tmp_path):
    def pays(*more, num_variants=1, residency="fp8"):
        settings = ["prompt=a cat", "height=480", "width=848", *more]
        config = load_config("my_lora", road(tmp_path, *(f"sample.{s}" for s in settings)))
        requests = read_requests(config.sample, config.data, 0, tmp_path)
        return pays_to_compile(residency, requests, num_variants)

    assert pays("num_frames=163") and not pays("num_frames=37")
    # Two videos side by side, or several, pay for it too.
    assert pays("num_frames=37", num_variants=2) and pays("num_frames=37", "seeds=[0,1]")
    assert not pays("num_frames=163", "preset=fast")
    # Only 8 bits are faster when they are compiled; with weights in host memory their copies take the time.
    assert all(pays("num_frames=163", residency=each) for each in PRECISIONS)
    assert not any(pays("num_frames=163", residency=each) for each in set(RESIDENCIES) - set(PRECISIONS))


def test_what_cannot_fit_is_refused_and_auto_chooses_what_does(tmp_path, monkeypatch):
    """The tiny model, of which the plan believes that it is the real one."""

    def full(_plan, residency, dtype_bytes, is_compiled=True):
        return sampling_held(DiTConfig(), 11130, residency, dtype_bytes, is_compiled=is_compiled)

    monkeypatch.setattr(sample_plan.RenderPlan, "held", full)
    chosen = []
    monkeypatch.setattr(recipe, "prepare_dit", lambda *arguments: chosen.append(arguments[2].residency) or 1 / 0)

    def residency(gib, memory, *settings_of_run):
        monkeypatch.setattr(sample_plan, "free_bytes", lambda _device: None if gib is None else int(gib * GIB))
        settings = ["prompt=a cat", "steps=1", "num_frames=7", f"prompt_cache={tmp_path / 'cache'}"]
        more = [f"sample.{s}" for s in settings] + ["model.dtype=bf16", f"memory={memory}", *settings_of_run]
        with pytest.raises(ZeroDivisionError):
            list(recipe.main(load_config("my_lora", road(tmp_path, *more))))
        return chosen.pop()

    assert [residency(gib, "auto") for gib in (None, 16, 8)] == ["resident", "resident", "offload"]
    assert [residency(12, memory) for memory in ("24gb", "16gb")] == ["fp8", "offload"]
    # Blocks that are not compiled hold copies of what they round to fp8.
    assert residency(9.5, "24gb", "sample.compile=true") == "fp8"
    with pytest.raises(ConfigError, match=r"sampling needs 10\.2 GiB .* and 9\.5 GiB are free: use memory=16gb\."):
        residency(9.5, "24gb", "sample.compile=false")
    # The decoder comes after all of the sampling.
    with monkeypatch.context() as patch:
        patch.setattr(WeightsFolder, "decoder_config", DecoderConfig())
        large = ["sample.height=720", "sample.width=1280"]
        with pytest.raises(
            ConfigError, match=r"decoding needs 12\.8 .* 12\.0 GiB are free: use memory\.tiles=\[1,2\]\.$"
        ):
            residency(12, "16gb", *large)
        assert residency(12, "16gb", *large, "memory.tiles=[1,2]") == "offload"
    with pytest.raises(
        ConfigError, match=r"sampling needs 15\.7 GiB .* and 12\.0 GiB .* use memory=24gb or memory=16gb"
    ):
        residency(12, "80gb")
    with pytest.raises(
        ConfigError, match=r"sampling needs .* use fewer frames, a smaller height and width, or more GPUs"
    ):
        residency(2, "auto")


def test_prompts_are_encoded_in_8_bits_where_those_of_prepare_are(tmp_path):
    """On a small GPU T5 fits in no other way; features of another precision are other entries of the cache."""
    prompts = tmp_path / "prompts"
    folder = WeightsFolder(weights_folder(load_config("my_lora", ["model=tiny"])))
    found = {}
    for t5, dtype in (("fp32", torch.float32), ("int8", torch.int8)):
        given = road(
            tmp_path / "run", f"memory.t5_dtype={t5}", f"sample.prompt_cache={prompts}", "train.sample_every=1",
            "train.sample_prompts=[a cat]", "train.steps=1", "sample.prompt=a cat", "sample.steps=1",
            "sample.num_frames=1", "sample.adapter=none", f"sample.out={tmp_path / t5}.png",
        )  # fmt: skip
        config = load_config("my_lora", given)
        assert len(list(recipe.main(config))) == 1
        found[t5] = PromptCache(prompts, folder.fingerprint("text_encoder"), dtype).get("a cat")
        assert torch.equal(encode_eval_prompts(check(config, 1))[0], found[t5].float()), t5
    assert not torch.equal(*(features.float() for features in found.values()))
