"""DeepSpeed sums gradients per parameter, although processes compute them in different orders."""

import os

import pytest
import torch
from helpers_golden import GOLDEN
from helpers_parallel import run_ranks
from torch import nn

from mochi_tune.cli.launch import prepare_deepspeed
from mochi_tune.weights.folder import WeightsFolder


class Branches(nn.Module):
    """A sum of layers; their gradients are computed in the reverse of the order of the forward pass."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((i + 1) * self.layers[i](x) for i in self.order)


def gradients(strategy: str, accumulation_steps: int) -> list[torch.Tensor]:
    prepare_deepspeed("cpu")
    from deepspeed.utils import safe_get_full_grad

    from mochi_tune.training.accelerator import build_accelerator, prepare

    torch.manual_seed(0)
    rank = int(os.environ["RANK"])
    model = Branches([0, 1, 2] if rank == 0 else [2, 0, 1])
    parameters = dict(model.named_parameters())
    accelerator = build_accelerator(torch.device("cpu"), strategy, accumulation_steps, 1e9)
    model, optimizer = prepare(accelerator, model, parameters, torch.optim.AdamW(model.parameters()), 1e9)
    for number in range(accumulation_steps):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 4), 1.0 + rank + number)).sum())
    norm = optimizer.clip_grad_norm()
    found = [safe_get_full_grad(p) if strategy == "zero2" else p.grad for p in parameters.values()]
    return [norm, *(gradient.clone() for gradient in found)]


@pytest.mark.parametrize("strategy", ["data", "zero2"])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_gradients_of_another_order_are_averaged_by_parameter(tmp_path, strategy, accumulation_steps):
    mean = 1.5 if accumulation_steps == 1 else 2.0
    for norm, *found in run_ranks(2, gradients, tmp_path, strategy, accumulation_steps):
        expected = [torch.full((4, 4), mean * (i + 1)) for i in range(3)]
        assert all(torch.allclose(ours, its) for ours, its in zip(found, expected, strict=True)), found
        assert norm.item() == pytest.approx(torch.stack(expected).norm().item())


def shares_while_loading(is_measured: bool) -> list[torch.Tensor]:
    prepare_deepspeed("cpu")
    from mochi_tune.training.accelerator import build_accelerator, then_partitioned

    accelerator, held = build_accelerator(torch.device("cpu"), "zero3", 1, 1.0), []

    def each_block(model: torch.nn.Module, _block: torch.nn.Module) -> None:
        held.append(sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta))

    dit = WeightsFolder(GOLDEN).load_dit("cpu", torch.float32, then_partitioned(accelerator, each_block, is_measured))
    blocks = sum(parameter.numel() for parameter in dit.blocks.parameters())
    return [torch.tensor([*held, blocks])]


@pytest.mark.parametrize("is_measured", [False, True])
def test_zero3_splits_each_block_as_soon_as_it_is_loaded(tmp_path, is_measured):
    for [counted] in run_ranks(2, shares_while_loading, tmp_path, is_measured):
        first, second, *_, blocks = counted.tolist()
        # A complete parameter of a block that is split has no numbers of its own.
        assert (blocks > 0) == is_measured and (second > 1.5 * first) == is_measured


def test_a_skipped_step_drops_its_gradients_and_changes_nothing():
    from mochi_tune.training.accelerator import build_accelerator, prepare

    model = nn.Linear(2, 2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    accelerator = build_accelerator(torch.device("cpu"), "data", 1, 1.0)
    sgd = torch.optim.SGD(model.parameters(), 1.0)
    model, optimizer = prepare(accelerator, model, dict(model.named_parameters()), sgd, 1.0)
    accelerator.backward(model(torch.ones(1, 2)).sum())
    optimizer.skip_step()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, model.parameters(), before))
