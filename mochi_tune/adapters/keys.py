"""Parses the keys of adapter files of any layout: which layer and which part of it a tensor is.

| written by                  | key of a half                                                          |
| --------------------------- | ---------------------------------------------------------------------- |
| the reference, `train`      | blocks.0.attn.qkv_x.lora_A                                             |
| diffusers, FastVideo        | transformer.transformer_blocks.0.attn1.to_q.lora_A.weight              |
| peft                        | base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight         |
| peft, of a live model       | transformer_blocks.0.attn1.to_q.lora_A.default.weight, or no .weight   |
| ComfyUI                     | diffusion_model.blocks.0.attn.qkv_x.lora_A.weight                      |
| kohya's and ComfyUI's tools | lora_unet_blocks_0_attn_qkv_x.lora_down.weight                         |

Wrappers of models add prefixes, such as `module.`, `_orig_mod.` and `model.diffusion_model.`, in any order.

Source: Comfy-Org/ComfyUI@a125cd8 comfy/lora.py (model_lora_keys_unet) and comfy/weight_adapter; the prefixes
`base_model.model.` and `.default.` are those of huggingface/peft@0.21.2 utils/save_and_load.py.
"""

import re
from typing import NamedTuple

from mochi_tune.adapters.layers import (
    DIFFUSERS_KINDS,
    OFFICIAL_KINDS,
    OFFICIAL_OUTER,
    OUTER_MODULES,
    is_diffusers,
    is_official,
    some,
)
from mochi_tune.errors import CheckpointError

_PREFIX = re.compile(r"(?:(?:base_model|model|module|_orig_mod|transformer|diffusion_model|dit|unet)\.)*")
_KOHYA_PREFIX = "lora_unet_"
_KOHYA_BLOCK = re.compile(r"(transformer_blocks|blocks)_(0|[1-9]\d{0,2})_(\w+)")
_HALVES = {"lora_A": "lora_A", "lora_B": "lora_B"}
_HALVES |= {"lora_down": "lora_A", "lora_up": "lora_B", "lora.down": "lora_A", "lora.up": "lora_B"}
_SUFFIX = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<weight>lora_[AB]|lora_down|lora_up|lora\.down|lora\.up)(?:\.(?P<adapter>\w+))?"
    r"\.(?:weight(?P<new_scale>_scale)?|(?P<scale>scale_weight))"
    r"|(?P<magnitude>lora_magnitude)(?:_vector(?:\.(?P<of_adapter>(?!weight$)\w+))?(?:\.weight)?)?"
    r"|(?P<half>lora_[AB])(?:\.(?P<bare_adapter>(?!bias$)\w+))?|(?P<alpha>alpha))"
)
# Names of other kinds of adapters, with a pattern of their keys.
_FOREIGN = {
    "a LoKr": r"\.lokr_",
    "a LoHa": r"\.hada_",
    "an OFT": r"\.(oft_|boft_)",
    "a GLoRA": r"\.[ab][12]\.weight$",
    "an IA3": r"\.(ia3_l|on_input)",
    "a VeRA": r"\.?vera_",
    "a LoCon with a middle factor": r"\.lora_mid\.",
    "a difference of whole weights": r"\.(diff|diff_b|set_weight|w_norm|b_norm)$",
    "a LoRA with trained biases": r"\.lora_(B|up)\.(\w+\.)?bias$",
    "a DoRA by rows of the base (dora_scale)": r"\.dora_scale$",
    "a LoRA of a text encoder": r"^(text_encoder|lora_te)",
    "a LoRA of the convolution x_embedder.proj (patch_embed.proj)": r"(x_embedder|patch_embed)[._]proj\.(lora|alpha)",
}
_CONV_NAMES = ("x_embedder.proj", "patch_embed.proj")


class Key(NamedTuple):
    """The meaning of a key of an adapter file.

    Attributes:
        module: official or diffusers name of the Linear.
        part: "lora_A", "lora_B", "magnitude", "alpha", or "lora_A scale" and "lora_B scale" for fp8 halves.
        adapter: peft's name of the adapter, or "" if the key has none.
    """

    module: str
    part: str
    adapter: str


def parse_key(key: str) -> Key | None:
    """Parses a key; returns None if it is not that of a Linear of Mochi."""
    match = _SUFFIX.fullmatch(key)
    module = _module_of(match["module"]) if match else None
    if match is None or module is None:
        return None
    adapter = match["adapter"] or match["of_adapter"] or match["bare_adapter"] or ""
    if half := match["half"] or match["weight"]:
        scale = " scale" if match["scale"] or match["new_scale"] else ""
        return Key(module, _HALVES[half] + scale, adapter)
    return Key(module, "magnitude" if match["magnitude"] else "alpha", adapter)


def check_foreign(keys: list[str]) -> None:
    """Refuses other kinds of adapters than LoRA and DoRA layers of the DiT's Linears, and whole models.

    Raises:
        CheckpointError: a key belongs to such a file.
    """
    for kind, pattern in _FOREIGN.items():
        if found := [key for key in keys if re.search(pattern, key)]:
            raise CheckpointError(
                f"it is or holds {kind}, in {some(found, limit=2)}, and only LoRA and DoRA layers of the DiT's Linears "
                "are read: use a file of such layers."
            )
    if found := [key for key in keys if _is_weight_of_a_model(key)]:
        raise CheckpointError(f"it is a model or a part of one, with {some(found, limit=2)}: name an adapter file.")


def _module_of(name: str) -> str | None:
    """Returns the official or diffusers name of a module from its name in a file, or None if Mochi lacks it."""
    if name.startswith(_KOHYA_PREFIX):
        return _dotted(name.removeprefix(_KOHYA_PREFIX))
    name = name[_prefix_length(name) :]
    return name if is_official(name) or is_diffusers(name) else None


def _prefix_length(name: str) -> int:
    match = _PREFIX.match(name)
    assert match is not None, "every part of the pattern is optional"
    return match.end()


def _underscored(names: list[str]) -> dict[str, str]:
    table = {name.replace(".", "_"): name for name in names}
    assert len(table) == len(names), "two modules have the same name in kohya's keys"
    return table


_KINDS = {
    "blocks": _underscored(list(DIFFUSERS_KINDS)),
    "transformer_blocks": _underscored(list(OFFICIAL_KINDS)),
}
_OUTER = _underscored([*OUTER_MODULES, *OFFICIAL_OUTER])


def _dotted(name: str) -> str | None:
    """Returns the name of a module from kohya's form, which has underscores instead of dots, or None."""
    if match := _KOHYA_BLOCK.fullmatch(name):
        kind = _KINDS[match[1]].get(match[3])
        return f"{match[1]}.{match[2]}.{kind}" if kind else None
    return _OUTER.get(name)


def _is_weight_of_a_model(key: str) -> bool:
    name, _, leaf = key[_prefix_length(key) :].rpartition(".")
    return leaf in ("weight", "bias") and (is_official(name) or is_diffusers(name) or name in _CONV_NAMES)
