"""What a wrong line in the training loop would change, looked at from outside: draws, losses, updates, refusals."""

import hashlib
import json
import math
import shutil
from contextlib import contextmanager

import pytest
import torch
from helpers_adapters import settings_of
from helpers_cache import BUCKETS
from helpers_golden import TOLERANCE, relative_error
from helpers_road import prepared, read_rows, road
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mochi_tune.adapters.lora import apply_lora, linear_shapes, lora_parameters
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.data.cache import open_cache
from mochi_tune.data.dataset import LatentDataset, collate
from mochi_tune.errors import ConfigError, TrainingError
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.models.latents import to_latents
from mochi_tune.recipes import train_lora
from mochi_tune.recipes.train_lora import main
from mochi_tune.training.checkpoint import load_adapter_tensors, manifest_of
from mochi_tune.training.draws import KeyedDraws
from mochi_tune.training.evaluate import ValidationClips, validation_losses
from mochi_tune.training.guards import is_finite
from mochi_tune.training.objective import velocity_loss
from mochi_tune.weights.folder import WeightsFolder

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


def recorded_step(run_dir, monkeypatch, *more: str) -> tuple[KeyedDraws, dict, list[dict]]:
    """Trains one step; returns its draws, its row, and what each micro-batch gave to the model and to the loss."""
    seen: list[dict] = []

    def record_loss(velocity, target):
        seen[-1]["target"] = target
        return velocity_loss(velocity, target)

    def record_input(module, inputs):
        if isinstance(module, AsymmDiT):
            seen.append(dict(zip(("noisy", "sigma", "prompt", "mask", "modulation"), inputs, strict=True)))

    monkeypatch.setattr(train_lora, "velocity_loss", record_loss)
    hook = register_module_forward_pre_hook(record_input)
    try:
        config = load_config("my_lora", road(run_dir, "lora.rank=1", "train.steps=1", "train.validate_every=0", *more))
        assert main(config) == 0
    finally:
        hook.remove()
    train = config.train
    draws = KeyedDraws(0, train.batch_size, train.accumulation_steps, train.caption_dropout, train.sigma_stratified)
    return draws, read_rows(run_dir / "metrics.jsonl")[0], seen


def test_a_step_mixes_what_was_drawn_for_its_clips_in_the_samplers_space(tmp_path, monkeypatch):
    """The clip is drawn from its posterior, normalised, and mixed with another noise; some captions are dropped."""
    more = ["train.batch_size=2", "train.accumulation_steps=3", "train.caption_dropout=0.5"]
    draws, row, seen = recorded_step(tmp_path, monkeypatch, *more)
    dataset = LatentDataset(open_cache(prepared() / "cache", BUCKETS))
    numbers = {entry.path: number for number, entry in enumerate(dataset.cache.rows)}
    assert len(seen) == 3
    base = WeightsFolder(weights_folder(load_config("my_lora", ["model=tiny"]))).load_dit(CPU, torch.float32)
    for micro_batch, got in enumerate(seen):
        drawn, rows = draws.draw(1, micro_batch, (12, 2, 4, 6)), slice(2 * micro_batch, 2 * micro_batch + 2)
        items = collate([dataset[numbers[clip]] for clip in row["clips"][rows]])
        sigma = draws.uniforms(1)[rows]
        assert torch.equal(got["sigma"], sigma) and row["sigmas"][rows] == [round(s, 6) for s in sigma.tolist()]
        clip = to_latents(items["mean"] + torch.exp(items["logvar"] / 2) * drawn.posterior_noise)
        share = sigma.view(-1, 1, 1, 1, 1)
        assert torch.allclose(got["noisy"], (1 - share) * clip + share * drawn.noise, rtol=1e-5, atol=1e-5)
        assert torch.allclose(got["target"], clip - drawn.noise, rtol=1e-5, atol=1e-5)
        kept = ~drawn.drops_caption
        assert torch.equal(got["mask"], items["prompt_mask"] & kept[:, None])
        assert torch.equal(got["prompt"], items["prompt_embeds"] * kept[:, None, None])
        # Computed in host memory before the step, by the base's own weights.
        expected = base.modulation_of(base.condition(sigma, got["prompt"], got["mask"]))
        for ours, theirs in zip(tree_leaves(got["modulation"]), tree_leaves(expected), strict=True):
            assert relative_error(ours, theirs) <= TOLERANCE
    assert len({tuple(got["mask"].any(1).tolist()) for got in seen}) > 1, "some captions are dropped, some kept"


def test_draws_are_standard_normal_and_unrelated():
    drawn = KeyedDraws(0, 1, 1, 0.1, False).draw(1, 0, (12, 8, 64, 64))
    noises = torch.stack([drawn.noise.flatten(), drawn.posterior_noise.flatten()])
    # 393216 values: the standard error of mean and correlation is 0.0016, that of the deviation 0.0011.
    assert abs(torch.corrcoef(noises)[0, 1].item()) < 0.01
    assert noises.mean(1).abs().max() < 0.01 and (noises.std(1) - 1).abs().max() < 0.01


def test_captions_are_dropped_at_every_sigma_alike():
    draws = KeyedDraws(0, 3, 1, 0.3, False)
    dropped, kept = [], []
    for step in range(300):
        drawn, sigma = draws.draw(step, 0, (1, 1, 1, 1)), draws.uniforms(step)
        dropped += sigma[drawn.drops_caption].tolist()
        kept += sigma[~drawn.drops_caption].tolist()
    assert 200 < len(dropped) < 340, "about 30 % of 900"
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
    dit = WeightsFolder(weights_folder(load_config("my_lora", ["model=tiny"]))).load_dit("cpu", torch.float32)
    apply_lora(dit, settings_of(list(linear_shapes(dit)), 2, 2.0, dropout), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(dit).values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return dit.train()


@pytest.fixture(scope="module")
def dataset():
    return LatentDataset(open_cache(prepared() / "cache", BUCKETS))


@pytest.mark.parametrize("objective", ["sampler", "official"])
def test_validation_is_the_loss_on_fixed_noise_at_fixed_sigmas(dataset, objective):
    calls = []

    def keep(module, inputs, output):
        if isinstance(module, AsymmDiT):
            calls.append((inputs[0], inputs[1], output))

    with watching(keep):
        got, _ = validation_losses(adapted_dit(0.0), ValidationClips(dataset, [0, 1], 0, objective), CPU)
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
    expected = validation_losses(plain, ValidationClips(dataset, [0, 1, 2], 0, "sampler"), CPU)
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert validation_losses(dropping, ValidationClips(dataset, [0, 1, 2], 0, "sampler"), CPU) == expected
        assert dropping.training and all(module.training for module in dropping.modules())
    assert validation_losses(plain, ValidationClips(dataset, [0, 1, 2], 1, "sampler"), CPU) != expected


def test_the_last_step_is_looked_at_though_no_interval_falls_on_it(tmp_path):
    more = ["train.steps=3", "train.validate_every=2", "train.sample_every=2", "train.sample_prompts=[a cat]"]
    assert train(tmp_path, *more, "sample.steps=2") == 0
    assert [row["step"] for row in read_rows(tmp_path / "validation.jsonl")] == [0, 2, 3]
    assert sorted(path.name for path in (tmp_path / "samples").glob("*.mp4")) == [
        f"step_00000{step}_prompt_0.mp4" for step in (0, 2, 3)
    ]
    last = tmp_path / "samples" / "step_000003_prompt_0.mp4"
    whole = last.read_bytes()
    # A crash of the machine may leave an empty file.
    last.write_bytes(b"")
    assert train(tmp_path, *more, "sample.steps=2") == 0 and last.read_bytes() == whole


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
    saved = load_adapter_tensors(tmp_path / "checkpoints" / "step_000001" / "adapter.safetensors")
    live = lora_parameters(seen[0])
    assert saved.keys() == live.keys() and any(t.any() for name, t in saved.items() if name.endswith("lora_B"))
    assert all(torch.equal(live[name], tensor) for name, tensor in saved.items())


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("one_step")
    assert train(run_dir, "train.steps=1") == 0
    return run_dir


def edit_state(run_dir, edit):
    """Changes what the only checkpoint says of its run, as if another version had written it."""
    state_file = run_dir / "checkpoints" / "step_000001" / "state.json"
    manifest_file = state_file.with_name("manifest.json")
    state, manifest = json.loads(state_file.read_text()), json.loads(manifest_file.read_text())
    edit(state)
    state_file.write_text(json.dumps(state))
    sums = manifest["sha256"] | {"state.json": hashlib.sha256(state_file.read_bytes()).hexdigest()}
    manifest_file.write_text(json.dumps(manifest_of(1, sums)))


def test_a_setting_that_an_earlier_version_did_not_have_had_its_default(one_step, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(one_step, run_dir)
    edit_state(run_dir, lambda state: state["settings"].pop("train.caption_dropout"))
    with pytest.raises(TrainingError, match=r"train\.caption_dropout was 0\.1, is 0\.5"):
        train(run_dir, "train.steps=2", "train.caption_dropout=0.5")
    assert train(run_dir, "train.steps=2") == 0
    assert "since step 1 train.steps was 1, is 2" in read_rows(run_dir / "history.jsonl")[-1]["notes"]


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("order", "the order of the clips differs from that of the first"),
        ("base", "the base model changed"),
        ("", "from an older version"),
    ],
)
def test_a_run_does_not_go_on_with_another_order_of_clips_or_base(one_step, tmp_path, part, text):
    run_dir = tmp_path / "run"
    shutil.copytree(one_step, run_dir)
    edit_state(run_dir, lambda state: state.update({part: "0" * len(state[part])}) if part else state.pop("order"))
    if not part:  # The rows have the clips of each step, and would show that the order is the same.
        metrics = run_dir / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace('"clips"', '"unread"'))
    with pytest.raises(TrainingError, match=f"{text}.*run_dir=DIR") as error:
        train(run_dir, "train.steps=2")
    assert ("undo that" in str(error.value)) == bool(part)
    assert len(read_rows(run_dir / "metrics.jsonl")) == 1


def test_deterministic_kernels_are_asked_for_while_it_trains_and_not_after(tmp_path):
    asked = set()

    def note(module, inputs, output):
        asked.add(torch.are_deterministic_algorithms_enabled())

    for value in (True, False):
        asked.clear()
        with watching(note):
            settings = ("train.steps=1", f"train.deterministic={str(value).lower()}", "train.sample_every=0")
            assert train(tmp_path / str(value), *settings) == 0
        assert True in asked if value else asked == {False}
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_kernel_is_named_in_one_line(tmp_path):
    def put(module, inputs, output):
        # Of the operations that torch has no such kernel for on a CPU.
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    match = r"^train\.deterministic=true is not possible here: put_.*false"
    with watching(put), pytest.raises(ConfigError, match=match):
        train(tmp_path, "train.steps=1", "train.deterministic=true", "train.sample_every=0")
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_loop_reads_its_numbers_once_a_step_however_many_micro_batches_it_has(tmp_path):
    class Reads(TorchDispatchMode):
        """Counts where the host waits for a number of the device."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    counts = {}
    # The first run prepares what the others share.
    for name, steps, accumulation in (("first", 1, 1), ("a", 1, 1), ("b", 3, 1), ("c", 1, 4), ("d", 3, 4)):
        settings = (f"train.steps={steps}", f"train.accumulation_steps={accumulation}", "train.validate_every=0")
        with Reads() as reads:
            assert train(tmp_path / name, *settings, "train.sample_every=0") == 0
        counts[name] = reads.calls
    assert 0 < counts["b"] - counts["a"] == counts["d"] - counts["c"], counts
