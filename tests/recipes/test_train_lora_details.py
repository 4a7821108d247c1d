"""What a wrong line in the training loop would change, looked at from outside: draws, losses, updates, refusals."""

import hashlib
import json
import math
import shutil
from contextlib import contextmanager

import pytest
import torch
from helpers_road import prepared, read_rows, road
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook

from mochi_tune.adapters.lora import apply_lora, layer_settings, linear_shapes, lora_parameters
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.data.cache import open_cache
from mochi_tune.data.dataset import LatentDataset
from mochi_tune.errors import TrainingError
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.models.latents import VAE_MEAN, VAE_STD, to_latents
from mochi_tune.recipes.train_lora import main
from mochi_tune.training.checkpoint import manifest_of
from mochi_tune.training.guards import is_finite
from mochi_tune.training.loader import Draws
from mochi_tune.training.validation import validation_losses
from mochi_tune.weights.load import load_dit

CPU = torch.device("cpu")
SIGMAS = (0.125, 0.375, 0.625, 0.875)


def train(run_dir, *more) -> int:
    return main(load_config("my_lora", road(run_dir, "lora.rank=2", "train.warmup_steps=0", *more)))


@contextmanager
def watching(hook):
    """Calls hook(module, inputs, output) after every module of whatever runs meanwhile."""
    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def standard_batch(rows: int, *size: int) -> dict:
    """Returns a batch whose posterior is the standard normal, with a prompt of one token a row."""
    return {
        "mean": torch.zeros(rows, 12, *size),
        "logvar": torch.zeros(rows, 12, *size),
        "prompt_embeds": torch.ones(rows, 1, 4),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.bool),
        "sample_ids": [f"{row}.mp4" for row in range(rows)],
    }


def drawn_clip_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what a training input was mixed from: input + sigma * target, and that less the target."""
    batch = Draws().mixed(standard_batch(1, 8, 64, 64), 1, 0)
    clip = batch.noisy + batch.sigma.view(-1, 1, 1, 1, 1) * batch.target
    return clip, clip - batch.target


def test_clips_are_drawn_from_their_posterior():
    clip, noise = drawn_clip_and_noise()
    std, mean = torch.tensor(VAE_STD), torch.tensor(VAE_MEAN)
    # 32768 values a channel: the standard error is 0.006.
    assert torch.allclose(clip.std((0, 2, 3, 4)), 1 / std, rtol=0.03)
    assert torch.allclose(clip.mean((0, 2, 3, 4)), -mean / std, atol=0.03)
    assert torch.allclose(noise.std((0, 2, 3, 4)), torch.ones(12), rtol=0.03)


def test_the_posteriors_noise_is_not_the_one_that_is_mixed_in():
    drawn = torch.stack([t.flatten() for t in drawn_clip_and_noise()])
    assert abs(torch.corrcoef(drawn)[0, 1].item()) < 0.1


def test_captions_are_dropped_at_every_sigma_alike():
    draws = Draws(caption_dropout=0.3, batch_size=3)
    dropped, kept = [], []
    for step in range(300):
        batch = draws.mixed(standard_batch(3, 1, 1, 1), step, 0)
        empty = ~batch.prompt_mask.any(1)
        dropped += batch.sigma[empty].tolist()
        kept += batch.sigma[~empty].tolist()
    assert len(dropped) > 200
    assert abs(sum(dropped) / len(dropped) - 0.5) < 0.07 and abs(sum(kept) / len(kept) - 0.5) < 0.07


def test_weight_decay_pulls_the_adapter_by_the_learning_rate(tmp_path):
    """While B is zero A has no gradient, so that the first step's decay is all that moves it."""
    adapters = []
    for decay in (0.0, 0.5):
        more = ["train.steps=1", "train.learning_rate=1e-2", f"train.weight_decay={decay}"]
        assert train(tmp_path / str(decay), *more) == 0
        adapters.append(load_file(tmp_path / str(decay) / "adapter.safetensors"))
    free, decayed = adapters
    names = [name for name in free if name.endswith("lora_A")]
    assert names and all(torch.allclose(decayed[n], free[n] * (1 - 1e-2 * 0.5), rtol=1e-5, atol=0) for n in names)


def test_dropout_of_the_adapter_is_on(tmp_path):
    rows = []
    for dropout in (0.0, 0.5):
        assert train(tmp_path / str(dropout), "train.steps=2", f"lora.dropout={dropout}") == 0
        rows.append(read_rows(tmp_path / str(dropout) / "metrics.jsonl"))
    # B is zero in the first step: the prediction does not see the adapter yet, its gradient does.
    assert rows[0][0]["loss"] == rows[1][0]["loss"] and rows[0][0]["grad_norm"] != rows[1][0]["grad_norm"]
    assert rows[0][1]["loss"] != rows[1][1]["loss"]


def test_each_micro_batch_of_each_step_has_its_own_dropout_and_keeps_it(tmp_path):
    def masks(run_dir, seed: int) -> list[torch.Tensor]:
        more = ["train.steps=2", "train.accumulation_steps=2", "lora.dropout=0.5", f"seed={seed}"]
        more += [r"lora.targets=['blocks\.0\.attn\.qkv_x']"]
        config = load_config("my_lora", road(run_dir, "lora.rank=2", *more))
        seen = []

        def keep(module, _, output):
            if isinstance(module, torch.nn.Dropout):
                seen.append(output == 0)

        with watching(keep):
            assert main(config) == 0
        return seen

    first = masks(tmp_path / "first", 0)
    assert len(first) == 4 and all(0.3 < mask.float().mean() < 0.7 for mask in first)
    assert all(not torch.equal(first[i], first[j]) for i in range(4) for j in range(i))
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, masks(tmp_path / "again", 0), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(first, masks(tmp_path / "other", 1), strict=True))


def adapted_dit(dropout: float) -> AsymmDiT:
    """Returns the tiny model in training mode with an adapter that does something."""
    dit = load_dit(weights_folder(load_config("my_lora", ["model=tiny"])), "cpu", torch.float32)
    apply_lora(dit, layer_settings(list(linear_shapes(dit)), 2, 2.0, dropout), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(dit).values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return dit.train()


@pytest.fixture(scope="module")
def dataset():
    return LatentDataset(open_cache(prepared() / "cache", num_frames=7, height=32, width=48))


@pytest.mark.parametrize("objective", ["sampler", "official"])
def test_validation_is_the_loss_on_fixed_noise_at_fixed_sigmas(dataset, objective):
    calls = []

    def keep(module, inputs, output):
        if isinstance(module, AsymmDiT):
            calls.append((inputs[0], inputs[1], output))

    with watching(keep):
        got = validation_losses(adapted_dit(0.0), dataset, [0, 1], 0, objective, CPU)
    noisy, sigma, prediction = (torch.cat(parts) for parts in zip(*calls, strict=True))
    assert sigma.tolist() == [*SIGMAS, *SIGMAS]
    losses = []
    for clip in range(2):
        mean = dataset[clip]["mean"]
        clean = to_latents(mean) if objective == "sampler" else mean
        noises = []
        for row in range(4 * clip, 4 * clip + 4):
            share = sigma[row]
            noises.append((noisy[row] - (1 - share) * clean) / share)
            target = to_latents(mean) - noises[-1] if objective == "sampler" else to_latents(mean - noises[-1])
            losses.append((prediction[row] - target).square().mean())
        assert all(torch.allclose(noise, noises[0], atol=1e-4) for noise in noises), "one noise for all sigmas"
        assert abs(noises[0].mean()) < 0.2 and abs(noises[0].std() - 1) < 0.2
    expected = torch.stack(losses).view(2, 4).mean(0).tolist()
    assert list(got) == [f"{sigma:g}" for sigma in SIGMAS] and list(got.values()) == pytest.approx(expected, rel=1e-5)


def test_validation_is_the_same_at_any_time_and_leaves_training_on(dataset):
    plain, dropping = adapted_dit(0.0), adapted_dit(0.5)
    expected = validation_losses(plain, dataset, [0, 1, 2], 0, "sampler", CPU)
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert validation_losses(dropping, dataset, [0, 1, 2], 0, "sampler", CPU) == expected
        assert dropping.training and all(module.training for module in dropping.modules())
    assert validation_losses(plain, dataset, [0, 1, 2], 1, "sampler", CPU) != expected


def test_the_last_step_is_looked_at_though_no_interval_falls_on_it(tmp_path):
    more = ["train.steps=3", "train.validate_every=2", "train.sample_every=2", "train.sample_prompts=[a cat]"]
    assert train(tmp_path, *more, "sample.steps=2") == 0
    assert [row["step"] for row in read_rows(tmp_path / "validation.jsonl")] == [0, 2, 3]
    assert sorted(path.name for path in (tmp_path / "samples").glob("*.mp4")) == [
        f"step_00000{step}_prompt_0.mp4" for step in (0, 2, 3)
    ]


@pytest.mark.parametrize("loss", [math.inf, math.nan, -math.inf])
def test_neither_loss_nor_norm_may_be_infinite(loss):
    assert is_finite(0.5, 0.5) and not is_finite(0.5, loss) and not is_finite(loss, 0.5)


def test_an_infinite_gradient_at_a_finite_loss_updates_nothing(tmp_path):
    """The gradient of the second step's prediction is replaced on its way back, so that only the norm can tell."""
    seen = []

    def spoil(module, _, output):
        if isinstance(module, AsymmDiT) and output.requires_grad:
            seen.append(module)
            if len(seen) == 2:
                output.register_hook(lambda gradient: torch.full_like(gradient, math.inf))

    with watching(spoil), pytest.raises(TrainingError, match=r"step 2: loss \d.*the update was not made"):
        train(tmp_path, "train.steps=4", "train.checkpoint_every=1")
    assert len(seen) == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    saved = load_file(tmp_path / "checkpoints" / "step_000001" / "adapter.safetensors")
    live = lora_parameters(seen[0])
    assert saved.keys() == live.keys() and any(t.any() for name, t in saved.items() if name.endswith("lora_B"))
    assert all(torch.equal(live[name], tensor) for name, tensor in saved.items())


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("one_step")
    assert train(run_dir, "train.steps=1") == 0
    return run_dir


@pytest.mark.parametrize("part", ["cache", "base"])
def test_a_run_does_not_go_on_from_another_cache_or_base(one_step, tmp_path, part):
    run_dir = tmp_path / "run"
    shutil.copytree(one_step, run_dir)
    state_file = run_dir / "checkpoints" / "step_000001" / "state.json"
    manifest_file = state_file.with_name("manifest.json")
    state, manifest = json.loads(state_file.read_text()), json.loads(manifest_file.read_text())
    state[part] = "0" * len(state[part])
    state_file.write_text(json.dumps(state))
    sums = manifest["sha256"] | {"state.json": hashlib.sha256(state_file.read_bytes()).hexdigest()}
    manifest_file.write_text(json.dumps(manifest_of(1, sums)))
    with pytest.raises(TrainingError, match=f"the {part} is another one.*run_dir=DIR"):
        train(run_dir, "train.steps=2")
    assert len(read_rows(run_dir / "metrics.jsonl")) == 1
