"""Several ranks, in real processes, compute the same outputs and gradients as one."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers_adapters import settings_of
from helpers_golden import GRADIENT_TOLERANCE, TOLERANCE
from helpers_parallel import run_ranks

from mochi_tune.adapters.lora import apply_lora, linear_shapes, lora_parameters
from mochi_tune.errors import ParallelError
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.parallel.context import INPUTS, apply_context_parallel

CONFIG = DiTConfig(depth=2, num_heads=12, hidden_size_x=96, hidden_size_y=48, t5_feat_dim=32)
# Tolerances of outputs and gradients. In fp64 only a bug causes errors of this size; for fp32, see
# models/test_rounding.py.
DTYPES = {torch.float64: (1e-10, 1e-10), torch.float32: (TOLERANCE, GRADIENT_TOLERANCE)}
# Latent frames, rows, columns: 7 frames of 15 tokens, which neither 2 nor 4 divides.
GRID = (7, 6, 10)
# For each number of heads, the adapters whose gradients are compared.
ADAPTERS = {12: ("none", "live", "dora"), 4: ("live",), 3: ("dora",), 6: ("dora",)}
# With dropout, each token must have the same mask as in one process.
DROPOUT = {"live": 0.25, "dora": 0.0}
TEXT_LENGTHS = {"one prompt": [5], "an empty prompt": [0], "different prompts": [6, 3, 0]}


def build(dtype: torch.dtype, adapter: str, num_heads: int) -> AsymmDiT:
    torch.manual_seed(0)
    dit = AsymmDiT(replace(CONFIG, num_heads=num_heads)).to(dtype)
    if adapter != "none":
        apply_lora(dit, settings_of(list(linear_shapes(dit)), 3, 6, DROPOUT[adapter]), seed=1, dora=adapter == "dora")
        for i, (name, parameter) in enumerate(lora_parameters(dit).items()):
            generator = torch.Generator().manual_seed(i)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3
            parameter.data = noise + 1 if name.endswith("magnitude") else noise
            parameter.requires_grad_(True)
    return dit


def inputs(lengths: list[int], dtype: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    latents, target = torch.randn(2, len(lengths), 12, *GRID, generator=generator, dtype=dtype)
    embeds = torch.randn(len(lengths), 8, CONFIG.t5_feat_dim, generator=generator, dtype=dtype)
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    return (latents, torch.linspace(0.2, 0.9, len(lengths)), embeds, mask), target


def outputs_and_gradients(group, num_heads: int, heads: int = 1) -> dict[str, torch.Tensor]:
    """Returns everything that one rank computes; the sum of the ranks' gradients is the complete gradient."""
    results = {}
    for dtype in DTYPES:
        for adapter in ADAPTERS[num_heads]:
            dit = build(dtype, adapter, num_heads)
            if group is not None:
                apply_context_parallel(dit, group, heads)
            for name, lengths in TEXT_LENGTHS.items():
                arguments, target = inputs(lengths, dtype)
                torch.manual_seed(4)
                out = dit(*arguments)
                key = f"{dtype} {adapter} {name}"
                results[key] = out.detach()
                if adapter == "none":
                    continue
                # Every rank has the complete output, and the sum of the ranks' losses must be the loss.
                loss = (out - target).square().mean() / (1 if group is None else dist.get_world_size(group))
                parameters = lora_parameters(dit)
                gradients = torch.autograd.grad(loss, list(parameters.values()))
                results |= {f"{key} gradient {name}": value for name, value in zip(parameters, gradients, strict=True)}
    return results


def in_a_rank(num_heads: int, heads: int) -> dict[str, torch.Tensor]:
    return outputs_and_gradients(dist.group.WORLD, num_heads, heads)


@pytest.fixture(scope="module")
def alone():
    return functools.cache(functools.partial(outputs_and_gradients, None))


@pytest.mark.parametrize(
    ("num_heads", "heads", "ring"),
    [(12, 2, 1), (12, 3, 1), (12, 4, 1), (3, 1, 2), (6, 1, 5), (6, 2, 2), (3, 3, 2), (4, 1, 3)],
)
def test_several_ranks_compute_what_one_does(num_heads, heads, ring, alone, tmp_path):
    expected_results = alone(num_heads)
    every_rank = run_ranks(heads * ring, in_a_rank, tmp_path, num_heads, heads)
    assert all(results.keys() == expected_results.keys() for results in every_rank)
    for key, expected in expected_results.items():
        is_gradient, of_ranks = "gradient" in key, [results[key] for results in every_rank]
        for result in [sum(of_ranks)] if is_gradient else of_ranks:
            error = (result - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
            assert error <= DTYPES[expected.dtype][is_gradient], f"{key}: {error}"


def drift(num_ranks: int) -> list[str]:
    """Calls the model with equal inputs on all ranks, and then with each input changed on the last rank."""
    dit, said = build(torch.float32, "none", 6), []
    apply_context_parallel(dit, dist.group.WORLD, heads=3, checks_inputs=True)
    is_last = dist.get_rank() == num_ranks - 1
    for changed in (None, 0, 1, 2, 3):
        arguments, _ = inputs([5], torch.float32)
        arguments = [x.clone() for x in arguments]
        if changed is not None and is_last:
            arguments[changed].view(-1)[0] = 0
        try:
            dit(*arguments)
            said.append("")
        except ParallelError as error:
            said.append(str(error))
    return said


def test_ranks_that_drift_apart_are_found_and_named(tmp_path):
    for same, *others in run_ranks(3, drift, tmp_path, 3):
        assert same == ""
        for name, text in zip(INPUTS, others, strict=True):
            assert f"diverged in {name}: context ranks 0 and 2 differ: all ranks must" in text and "\n" not in text
