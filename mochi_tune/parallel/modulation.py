"""Replaces the modulation layers, a quarter of the DiT, by tables of what they compute in one rendering.

Their only input is the conditioning vector of a noise level and a prompt. A rendering has few of both, all known before
its first step, so the outputs are computed once, and the weights leave the device.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mochi_tune.models.dit import AsymmDiT, AsymmetricJointBlock


class TabulatedLinear(nn.Module):
    """Stands in for a Linear whose inputs are known: a `ModulationTable` sets its output before a forward pass."""

    output: Tensor | None

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        super().__init__()
        # In a tuple, so that it is no part of the model: not moved with it, sharded or quantised.
        self.linear = (linear.to("cpu"),)
        self.device = device
        self.output = None

    def compute(self, inputs: Tensor) -> Tensor:
        """Returns the Linear's outputs of inputs (n, D); its weights are on the device only for this."""
        (linear,) = self.linear
        return F.linear(inputs, linear.weight.to(self.device), linear.bias.to(self.device))

    def forward(self, c: Tensor) -> Tensor:
        """Returns the selected outputs (B, out), which are those of c (B, D)."""
        assert self.output is not None, "no row of the modulation table is selected"
        assert len(self.output) == len(c), "the modulation table needs one row for each sample"
        return self.output


def apply_modulation_tables(block: AsymmetricJointBlock, device: torch.device) -> None:
    """Moves the weights of a block's modulation layers to the CPU; a `ModulationTable` stands in for them.

    Args:
        block: with its weights.
        device: where it computes.
    """
    block.set_submodule("mod_x", TabulatedLinear(block.mod_x, device))
    block.set_submodule("mod_y", TabulatedLinear(block.mod_y, device))


class ModulationTable:
    """What a model's modulation layers compute in one rendering, by noise level and prompt.

    A model whose layers were not replaced computes them itself: its table is empty.
    """

    @torch.no_grad()
    def __init__(self, dit: nn.Module, sigmas: Sequence[float], prompts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Computes the modulation of every noise level with every prompt.

        Args:
            dit: its blocks went through `apply_modulation_tables`, or not.
            sigmas: all noise levels of the rendering.
            prompts: by name, the embeddings (1, L, D) and the mask (1, L) of each prompt of the rendering.
        """
        levels = list(dict.fromkeys(sigmas))
        self.rows = {key: row for row, key in enumerate(itertools.product(prompts, levels))}
        self.layers = [module for module in dit.modules() if isinstance(module, TabulatedLinear)]
        self.outputs: list[Tensor] = []
        if self.layers:
            assert isinstance(dit, AsymmDiT)
            conditions = _conditions(dit, levels, list(prompts.values()))
            self.outputs = [layer.compute(conditions) for layer in self.layers]

    @contextlib.contextmanager
    def selected(self, sigma: float, prompts: Sequence[str]) -> Iterator[None]:
        """Gives the layers the outputs of one forward pass.

        Args:
            sigma: one of the rendering's noise levels.
            prompts: the name of each sample's prompt.
        """
        unknown = [(prompt, sigma) for prompt in prompts if (prompt, sigma) not in self.rows]
        assert not unknown, f"the modulation table has no row for {unknown}"
        rows = [self.rows[prompt, sigma] for prompt in prompts]
        for layer, outputs in zip(self.layers, self.outputs, strict=True):
            # Slices: to send the indexes to the device would wait for it.
            layer.output = torch.cat([outputs[row : row + 1] for row in rows])
        try:
            yield
        finally:
            for layer in self.layers:
                layer.output = None


def _conditions(dit: AsymmDiT, levels: list[float], prompts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns the conditioning vectors of every prompt with every level, (len(prompts) * len(levels), D)."""
    device = dit.pos_frequencies.device
    sigma = torch.tensor(levels, device=device)
    rows = []
    for embeds, mask in prompts:
        assert len(embeds) == 1, "all samples of a rendering have the same prompt"
        rows.append(dit.condition(sigma, embeds.to(device).expand(len(levels), -1, -1), mask.expand(len(levels), -1)))
    return torch.cat(rows)
