"""What the validation loss and the base of the eval videos depend on."""

import os
from dataclasses import replace
from types import SimpleNamespace

import torch
from accelerate import PartialState
from helpers_cache import BUCKETS, make_cache
from helpers_step import CONFIG
from torch import nn

from mochi_tune.config.load import load_config
from mochi_tune.data.cache import open_cache
from mochi_tune.data.dataset import LatentDataset
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.models.latents import to_latents, to_vae_latents
from mochi_tune.training import evaluate
from mochi_tune.training.evaluate import SIGMAS, EvalVideos, ValidationClips, validation_losses

CPU = torch.device("cpu")


def make_dataset(folder, *captions: str) -> LatentDataset:
    make_cache(folder, {f"clip{number}.mp4": caption for number, caption in enumerate(captions)})
    return LatentDataset(open_cache(folder, BUCKETS))


class Recorder(nn.Module):
    """Predicts its input and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[torch.Tensor] = []

    def forward(self, noisy: torch.Tensor, *_) -> torch.Tensor:
        self.inputs.append(noisy)
        return noisy


def test_every_clip_has_its_own_validation_noise_whatever_else_is_measured(tmp_path):
    dataset = make_dataset(tmp_path, "a cat", "a dog")

    def noise_of(indices: list[int]) -> dict[int, torch.Tensor]:
        dit = Recorder()
        validation_losses(dit, ValidationClips(dataset, indices, 0, "sampler"), CPU)
        first = dict(zip(indices, dit.inputs[:: len(SIGMAS)], strict=True))
        share = SIGMAS[0]
        return {i: (noisy - (1 - share) * to_latents(dataset[i]["mean"])) / share for i, noisy in first.items()}

    together, alone = noise_of([0, 1]), noise_of([1])
    assert torch.equal(together[1], alone[1])
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_the_digest_of_a_validation_changes_with_all_that_its_losses_depend_on(tmp_path):
    dataset, others = make_dataset(tmp_path / "a", "a cat", "a dog"), make_dataset(tmp_path / "b", "a cat", "a bird")
    digest = ValidationClips(dataset, [0, 1], 0, "sampler").digest([0, 1])
    assert ValidationClips(dataset, [0, 1], 0, "sampler").digest([0, 1]) == digest
    changed = [
        ValidationClips(dataset, [0, 1], 0, "sampler").digest([0]),
        ValidationClips(others, [0, 1], 0, "sampler").digest([0, 1]),
        ValidationClips(dataset, [0, 1], 1, "sampler").digest([0, 1]),
        ValidationClips(dataset, [0, 1], 0, "official").digest([0, 1]),
    ]
    assert len({digest, *changed}) == 5
    # The first clip is the same in both caches.
    assert ValidationClips(others, [0], 0, "sampler").digest([0]) == changed[0]


def test_the_base_of_an_eval_video_is_sampled_again_for_other_weights_or_settings(tmp_path, monkeypatch):
    PartialState(cpu=True)
    size = ["data.num_frames=1", "data.height=32", "data.width=32", "sample.steps=1"]
    config = load_config("my_lora", ["model=tiny", "device=cpu", *size, f"run_dir={tmp_path}"])
    plan = SimpleNamespace(config=config, identity={"base": "a base"})
    run = SimpleNamespace(plan=plan, check_signals=lambda: None)
    dit, prompts = AsymmDiT(replace(CONFIG, depth=1)), [torch.ones(2, 16), torch.zeros(0, 16)]

    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), fsync(file)))

    def num_sampled() -> int:
        EvalVideos(run, prompts)._base(dit, 0)
        return len(list((tmp_path / "base_latents").iterdir()))

    assert num_sampled() == num_sampled() == 1
    [saved] = (tmp_path / "base_latents").iterdir()
    whole = saved.read_bytes()
    # A crash of the machine may have cut it.
    saved.write_bytes(whole[:-1])
    assert num_sampled() == 1 and saved.read_bytes() == whole and saved.stat().st_ino in synced
    plan.identity["base"] = "another base"
    assert num_sampled() == 2
    for count, (section, name, value) in enumerate(
        (("model", "dtype", "bf16"), ("model", "precision", "int8"), ("sample", "steps", 2)), 3
    ):
        changed = getattr(plan.config, section).model_copy(update={name: value})
        plan.config = plan.config.model_copy(update={section: changed})
        assert num_sampled() == count, name


def test_the_halves_of_a_video_are_decoded_one_after_the_other(monkeypatch):
    begun = []

    def decode_chunks(decoder, latents):
        for _ in range(2):
            begun.append(latents[0, 0, 0, 0, 0] > base[0, 0, 0, 0, 0])
            yield torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8)

    base, adapted = to_vae_latents(torch.zeros(1, 12, 2, 2, 2)), torch.ones(1, 12, 2, 2, 2)
    monkeypatch.setattr(evaluate, "decode_chunks", decode_chunks)
    videos = SimpleNamespace(run=SimpleNamespace(is_asked_to_stop=bool))
    chunks = list(EvalVideos._side_by_side(videos, None, torch.zeros_like(adapted), adapted))
    assert begun == [False, False, True, True] and [chunk.shape for chunk in chunks] == [(1, 4, 8, 3)] * 2
