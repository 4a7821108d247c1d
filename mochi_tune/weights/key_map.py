"""Maps each official tensor to its pieces in the diffusers layout.

diffusers splits q, k and v, and swaps the halves of a SwiGLU's w1 (gate, value) and of the final layer's modulation
(shift, scale). The VAE differs only by its names and by separate q, k and v. Every map is exact in both directions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.vae import Decoder, DecoderConfig, Encoder, EncoderConfig


@dataclass(frozen=True)
class Pieces:
    """The tensors that give one official tensor when stacked along their first dim, with its halves swapped or not."""

    names: tuple[str, ...]
    swap_halves: bool = False

    def join(self, read: Callable[[str], Tensor], out: Tensor) -> None:
        """Fills the official tensor `out` with the pieces that `read` returns; memory holds one piece at a time."""
        if self.swap_halves:
            halves = read(self.names[0]).chunk(2)
            for slot, half in zip(out.chunk(2), reversed(halves), strict=True):
                slot.copy_(half)
        else:
            for slot, name in zip(out.chunk(len(self.names)), self.names, strict=True):
                slot.copy_(read(name))

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Splits an official tensor into its pieces, by name; they do not share memory with each other."""
        if self.swap_halves:
            return {self.names[0]: torch.cat(tensor.chunk(2)[::-1])}
        if len(self.names) == 1:
            return {self.names[0]: tensor}
        return {name: part.clone() for name, part in zip(self.names, tensor.chunk(len(self.names)), strict=True)}


def diffusers_map(model: AsymmDiT | Encoder | Decoder) -> dict[str, Pieces]:
    """Maps the official name of each parameter of a model to its pieces in diffusers' `transformer/` or `vae/`.

    Source: huggingface/diffusers@0a54230 scripts/convert_mochi_to_diffusers.py, and the modules of
    transformer_mochi.py and autoencoder_kl_mochi.py (0.42).
    """
    if isinstance(model, AsymmDiT):
        modules = _dit_modules(model.config)
    elif isinstance(model, Encoder):
        modules = _encoder_modules(model.config)
    else:
        modules = _decoder_modules(model.config)
    mapping = {}
    for name in model.state_dict():
        module, _, leaf = name.rpartition(".")
        pieces = modules[module]
        mapping[name] = Pieces(tuple(f"{p}.{leaf}" if p else leaf for p in pieces.names), pieces.swap_halves)
    return mapping


def _dit_modules(config: DiTConfig) -> dict[str, Pieces]:
    modules = {
        "": Pieces(("",)),  # pos_frequencies, a parameter of the model itself
        "x_embedder.proj": Pieces(("patch_embed.proj",)),
        "t_embedder.mlp.0": Pieces(("time_embed.timestep_embedder.linear_1",)),
        "t_embedder.mlp.2": Pieces(("time_embed.timestep_embedder.linear_2",)),
        "t5_y_embedder.to_kv": Pieces(("time_embed.pooler.to_kv",)),
        "t5_y_embedder.to_q": Pieces(("time_embed.pooler.to_q",)),
        "t5_y_embedder.to_out": Pieces(("time_embed.pooler.to_out",)),
        "t5_yproj": Pieces(("time_embed.caption_proj",)),
        "final_layer.mod": Pieces(("norm_out.linear",), swap_halves=True),
        "final_layer.linear": Pieces(("proj_out",)),
    }
    for i in range(config.depth):
        # The text modulation of the last block is of another class in diffusers, with another name of its layer.
        mod_y = "norm1_context.linear" if i < config.depth - 1 else "norm1_context.linear_1"
        block = {
            "mod_x": Pieces(("norm1.linear",)),
            "mod_y": Pieces((mod_y,)),
            "attn.qkv_x": Pieces(("attn1.to_q", "attn1.to_k", "attn1.to_v")),
            "attn.qkv_y": Pieces(("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj")),
            "attn.q_norm_x": Pieces(("attn1.norm_q",)),
            "attn.k_norm_x": Pieces(("attn1.norm_k",)),
            "attn.q_norm_y": Pieces(("attn1.norm_added_q",)),
            "attn.k_norm_y": Pieces(("attn1.norm_added_k",)),
            "attn.proj_x": Pieces(("attn1.to_out.0",)),
            "attn.proj_y": Pieces(("attn1.to_add_out",)),
            "mlp_x.w1": Pieces(("ff.net.0.proj",), swap_halves=True),
            "mlp_x.w2": Pieces(("ff.net.2",)),
            "mlp_y.w1": Pieces(("ff_context.net.0.proj",), swap_halves=True),
            "mlp_y.w2": Pieces(("ff_context.net.2",)),
        }
        for ours, pieces in block.items():
            names = tuple(f"transformer_blocks.{i}.{name}" for name in pieces.names)
            modules[f"blocks.{i}.{ours}"] = Pieces(names, pieces.swap_halves)
    return modules


def _encoder_modules(config: EncoderConfig) -> dict[str, Pieces]:
    modules = {
        "layers.0": Pieces(("encoder.proj_in",)),
        "output_norm": Pieces(("encoder.norm_out.norm_layer",)),
        "output_proj": Pieces(("encoder.proj_out",)),
    }
    num_first, *num_down, num_last = config.num_res_blocks
    layer = 1
    for k in range(num_first):
        modules |= _res_block(f"layers.{layer}", "encoder.block_in", k)
        layer += 1
    for i, num_blocks in enumerate(num_down):
        modules[f"layers.{layer}.layers.0"] = Pieces((f"encoder.down_blocks.{i}.conv_in.conv",))
        for k in range(num_blocks):
            modules |= _res_block(f"layers.{layer}.layers.{k + 1}", f"encoder.down_blocks.{i}", k)
        layer += 1
    for k in range(num_last):
        modules |= _res_block(f"layers.{layer}", "encoder.block_out", k)
        layer += 1
    return modules


def _decoder_modules(config: DecoderConfig) -> dict[str, Pieces]:
    modules = {"blocks.0.0": Pieces(("decoder.conv_in",)), "output_proj": Pieces(("decoder.proj_out",))}
    num_last, *num_up, num_first = config.num_res_blocks
    for k in range(num_first):
        modules |= _res_block(f"blocks.0.{k + 1}", "decoder.block_in", k)
    for i, num_blocks in enumerate(reversed(num_up)):
        modules[f"blocks.{i + 1}.proj"] = Pieces((f"decoder.up_blocks.{i}.proj",))
        for k in range(num_blocks):
            modules |= _res_block(f"blocks.{i + 1}.blocks.{k}", f"decoder.up_blocks.{i}", k)
    for k in range(num_last):
        modules |= _res_block(f"blocks.{len(num_up) + 1}.{k}", "decoder.block_out", k)
    return modules


def _res_block(ours: str, theirs: str, index: int) -> dict[str, Pieces]:
    resnet, attention = f"{theirs}.resnets.{index}", f"{theirs}.attentions.{index}"
    return {
        f"{ours}.stack.0": Pieces((f"{resnet}.norm1.norm_layer",)),
        f"{ours}.stack.2": Pieces((f"{resnet}.conv1.conv",)),
        f"{ours}.stack.3": Pieces((f"{resnet}.norm2.norm_layer",)),
        f"{ours}.stack.5": Pieces((f"{resnet}.conv2.conv",)),
        f"{ours}.attn_block.norm": Pieces((f"{theirs}.norms.{index}.norm_layer",)),
        f"{ours}.attn_block.attn.qkv": Pieces((f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v")),
        f"{ours}.attn_block.attn.out": Pieces((f"{attention}.to_out.0",)),
    }
