"""Modulation computed ahead: a quarter of the DiT's weights, which see a noise level and a prompt and no token.

A rendering has few noise levels and prompts, all known before its first step; a training knows those of a step before
the step. So these weights stay in host memory, and the device gets what they make of a noise level and a prompt.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mochi_tune.models.dit import AsymmDiT, AsymmetricJointBlock, Modulation, condition, pack_prompts


class HostLinear(nn.Module):
    """A Linear whose weights stay in host memory; it computes where its input is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # In a tuple, so that it is no part of the model: not moved with it, sharded or quantised.
        self.linear = (linear.to("cpu"),)

    @property
    def weight(self) -> Tensor:
        """The weight, in host memory; what a DoRA does to its rows is worked out from it."""
        return self.linear[0].weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, in host memory."""
        return self.linear[0].bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps (n, in) to (n, out); weights go to a GPU for this call alone."""
        (linear,) = self.linear
        return F.linear(inputs, linear.weight.to(inputs.device), linear.bias.to(inputs.device))


def apply_host_modulation(block: AsymmetricJointBlock) -> None:
    """Moves the weights of a block's modulation layers to host memory; those of their adapters stay on the device."""
    for name in ("mod_x", "mod_y"):
        while not isinstance(block.get_submodule(name), nn.Linear):
            name = f"{name}.base_layer"
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        block.set_submodule(name, HostLinear(linear))


class HostModulation:
    """Computes modulation in host memory, ahead of the step that needs it; in any thread."""

    def __init__(self, dit: AsymmDiT) -> None:
        """Keeps the blocks' modulation layers and copies of the embedders, as they are now.

        Args:
            dit: its blocks went through `apply_host_modulation`, or not: then it computes its own in each pass.
        """
        self.is_empty = not isinstance(dit.blocks[0].get_submodule("mod_x"), HostLinear)
        self.dtype = dit.dtype
        self.t_embedder, self.t5_y_embedder = (
            copy.deepcopy(each).to("cpu") for each in (dit.t_embedder, dit.t5_y_embedder)
        )
        self.layers = [(block.get_submodule("mod_x"), block.get_submodule("mod_y")) for block in dit.blocks]

    @torch.no_grad()
    def __call__(self, sigma: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> Modulation | None:
        """Returns the modulation of B samples, on the CPU; arguments as for `AsymmDiT.forward`, on the CPU."""
        if self.is_empty:
            return None
        prompt_embeds, mask, _ = pack_prompts(prompt_embeds, prompt_mask)
        c = condition(self.t_embedder, self.t5_y_embedder, sigma, prompt_embeds.to(self.dtype), mask)
        return Modulation(c, tuple((mod_x(c), mod_y(c)) for mod_x, mod_y in self.layers))


class ModulationTable:
    """The modulation of every noise level with every prompt of one rendering."""

    @torch.no_grad()
    def __init__(self, dit: nn.Module, sigmas: Sequence[float], prompts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Computes it, if the model's modulation layers are in host memory; other models compute it in each pass.

        Args:
            dit: its blocks went through `apply_host_modulation`, or not.
            sigmas: all noise levels of the rendering.
            prompts: by name, the embeddings (1, L, D) and the mask (1, L) of each prompt of the rendering.
        """
        levels = list(dict.fromkeys(sigmas))
        self.rows = {key: row for row, key in enumerate(itertools.product(prompts, levels))}
        self.all: Modulation | None = None
        if not any(isinstance(module, HostLinear) for module in dit.modules()):
            return
        # DeepSpeed's engine has the model inside.
        dit = getattr(dit, "module", dit)
        assert isinstance(dit, AsymmDiT)
        device = dit.pos_frequencies.device
        sigma = torch.tensor(levels, device=device)
        c = []
        for embeds, mask in prompts.values():
            assert len(embeds) == 1, "all samples of a rendering have the same prompt"
            expanded = embeds.to(device).expand(len(levels), -1, -1), mask.expand(len(levels), -1)
            c.append(dit.condition(sigma, *expanded))
        self.all = dit.modulation_of(torch.cat(c))

    def select(self, sigma: float, prompts: Sequence[str]) -> Modulation | None:
        """Returns the modulation of one forward pass; None where the model computes it.

        Args:
            sigma: one of the rendering's noise levels.
            prompts: the name of each sample's prompt.
        """
        if self.all is None:
            return None
        unknown = [(prompt, sigma) for prompt in prompts if (prompt, sigma) not in self.rows]
        assert not unknown, f"the modulation table has no row for {unknown}"
        rows = [self.rows[prompt, sigma] for prompt in prompts]

        def pick(outputs: Tensor) -> Tensor:
            # Slices: to send the indexes to the device would wait for it.
            return torch.cat([outputs[row : row + 1] for row in rows])

        return Modulation(pick(self.all.c), tuple((pick(mod_x), pick(mod_y)) for mod_x, mod_y in self.all.blocks))
