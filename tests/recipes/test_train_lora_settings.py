"""Each setting of the noise levels, the loss and the learning rate changes the training step as it should."""

import pytest
import torch
from helpers_road import read_rows, train
from safetensors.torch import load_file

from mochi_tune.recipes import train_lora
from mochi_tune.training.draws import KeyedDraws
from mochi_tune.training.objective import loss_weight, sigmas_from_uniforms
from mochi_tune.training.schedule import learning_rate_at


def test_the_settings_of_sigma_and_the_loss_reach_the_step(tmp_path, monkeypatch):
    losses, velocity_loss = [], train_lora.velocity_loss

    def record(*arguments):
        losses.append(velocity_loss(*arguments))
        return losses[-1]

    monkeypatch.setattr(train_lora, "velocity_loss", record)
    sigma = ["train.sigma_distribution=logit_normal", "train.sigma_mean=0.5", "train.sigma_std=2"]
    batch = ["train.batch_size=2", "train.accumulation_steps=2", "train.steps=1"]
    assert train(tmp_path, *sigma, *batch, "train.loss_weighting=bell") == 0
    [row] = read_rows(tmp_path / "metrics.jsonl")
    expected = sigmas_from_uniforms(KeyedDraws(0, 2, 2, 0.1, False).uniforms(1), "logit_normal", 0.5, 2.0)
    assert row["sigmas"] == [round(value, 6) for value in expected.tolist()]
    loss = (loss_weight(expected, "bell") * torch.cat(losses).detach()).mean()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_settings_of_the_learning_rate_reach_the_step(tmp_path):
    schedule = ["train.schedule=wsd", "train.decay_share=0.5", "train.warmup_steps=1", "train.steps=4"]
    assert train(tmp_path / "schedule", *schedule, "train.learning_rate=1e-3") == 0
    rates = [row["lr"] for row in read_rows(tmp_path / "schedule" / "metrics.jsonl")]
    assert rates == [learning_rate_at(step, 1e-3, 1, 4, "wsd", 0.5) for step in range(1, 5)]
    constant = ["train.schedule=constant", "train.warmup_steps=0", "train.steps=1", "train.weight_decay=0"]
    assert train(tmp_path / "ratio", *constant, "train.learning_rate=1e-3", "train.learning_rate_b_ratio=8") == 0
    tensors = load_file(tmp_path / "ratio" / "adapter.safetensors")
    # B starts at 0, and Adam's first step moves each number by the learning rate.
    moved = max(tensor.abs().max().item() for name, tensor in tensors.items() if name.endswith("lora_B"))
    assert moved == pytest.approx(8e-3, rel=1e-2)
