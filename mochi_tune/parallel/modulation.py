"""Computes modulation ahead of the steps that use it, so that a quarter of the DiT's weights can stay in host memory.

The input of the modulation layers is the noise level and the prompt, not the tokens. A rendering has few noise levels
and prompts, all known before its first step; training knows those of a step before the step. So the weights stay in
host memory, and the device only gets their outputs.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mochi_tune.models.dit import AsymmDiT, AsymmetricJointBlock, Modulation, condition, pack_prompts


class HostLinear(nn.Module):
    """A Linear whose weights stay in host memory; it computes on the device of its input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # In a tuple, so that it is not a submodule and is not moved, sharded or quantized with the model.
        self.linear = (linear.to("cpu"),)

    @property
    def weight(self) -> Tensor:
        """The weight, in host memory; a DoRA computes the norms of its rows from it."""
        return self.linear[0].weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, in host memory."""
        return self.linear[0].bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps (n, in) to (n, out); the weights are copied to the input's device for this call."""
        (linear,) = self.linear
        return F.linear(inputs, linear.weight.to(inputs.device), linear.bias.to(inputs.device))


def apply_host_modulation(block: AsymmetricJointBlock) -> None:
    """Moves the weights of a block's modulation layers to host memory; their adapters stay on the device."""
    for name in ("mod_x", "mod_y"):
        while not isinstance(block.get_submodule(name), nn.Linear):
            name = f"{name}.base_layer"
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        block.set_submodule(name, HostLinear(linear))


class HostModulation:
    """Computes modulation on the CPU, ahead of the step that needs it; can be called in any thread."""

    def __init__(self, dit: AsymmDiT) -> None:
        """Keeps the blocks' modulation layers and copies of the current embedders.

        Args:
            dit: the model. If `apply_host_modulation` was not applied to its blocks, calls return None, and the model
                computes the modulation in each pass.
        """
        self.is_empty = not isinstance(dit.blocks[0].get_submodule("mod_x"), HostLinear)
        self.dtype = dit.dtype
        self.t_embedder, self.t5_y_embedder = (
            copy.deepcopy(each).to("cpu") for each in (dit.t_embedder, dit.t5_y_embedder)
        )
        self.layers = [(block.get_submodule("mod_x"), block.get_submodule("mod_y")) for block in dit.blocks]

    @torch.no_grad()
    def __call__(self, sigma: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> Modulation | None:
        """Returns the modulation of B samples on the CPU; arguments as for `AsymmDiT.forward`, on the CPU."""
        if self.is_empty:
            return None
        prompt_embeds, mask, _ = pack_prompts(prompt_embeds, prompt_mask)
        c = condition(self.t_embedder, self.t5_y_embedder, sigma, prompt_embeds.to(self.dtype), mask)
        return Modulation(c, tuple((mod_x(c), mod_y(c)) for mod_x, mod_y in self.layers))


class ModulationTable:
    """The modulation of every combination of noise level and prompt of one rendering."""

    @torch.no_grad()
    def __init__(self, dit: nn.Module, sigmas: Sequence[float], prompts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Computes the table if the model's modulation layers are in host memory; else the model does in each pass.

        Args:
            dit: the model, with or without `apply_host_modulation` on its blocks.
            sigmas: all noise levels of the rendering.
            prompts: embeddings (1, L, D) and mask (1, L) of each prompt of the rendering, by name.
        """
        levels = list(dict.fromkeys(sigmas))
        self.rows = {key: row for row, key in enumerate(itertools.product(prompts, levels))}
        self.all: Modulation | None = None
        if not any(isinstance(module, HostLinear) for module in dit.modules()):
            return
        # DeepSpeed's engine wraps the model.
        dit = getattr(dit, "module", dit)
        assert isinstance(dit, AsymmDiT)
        device = dit.pos_frequencies.device
        sigma = torch.tensor(levels, device=device)
        c = []
        for embeds, mask in prompts.values():
            assert len(embeds) == 1, "a rendering has one prompt of each name"
            expanded = embeds.to(device).expand(len(levels), -1, -1), mask.expand(len(levels), -1)
            c.append(dit.condition(sigma, *expanded))
        self.all = dit.modulation_of(torch.cat(c))

    def select(self, sigma: float, prompts: Sequence[str]) -> Modulation | None:
        """Returns the modulation of one forward pass, or None if the model computes it.

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
            # Slices, because copying an index tensor to the device would synchronize.
            return torch.cat([outputs[row : row + 1] for row in rows])

        return Modulation(pick(self.all.c), tuple((pick(mod_x), pick(mod_y)) for mod_x, mod_y in self.all.blocks))
