"""Makes the embedded tiny model: random weights of every part, in the official layout, from a seed.

It has the architecture of Mochi 1 and a few hundred thousand parameters, so that all commands run on a laptop. Its
videos are coloured noise: it tests that the commands run, not what a model learns.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mochi_tune.files import write_json
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.vae import Decoder, DecoderConfig, Encoder, EncoderConfig

# Sizes that diffusers supports too: its text MLP is not rounded up to a multiple of 256.
DIT = DiTConfig(depth=2, num_heads=6, hidden_size_x=192, hidden_size_y=96, t5_feat_dim=64)
ENCODER = EncoderConfig(base_channels=32, channel_multipliers=(1, 1, 1, 1), num_res_blocks=(1, 1, 1, 1, 1))
DECODER = DecoderConfig(base_channels=32, channel_multipliers=(1, 1, 1, 1), num_res_blocks=(1, 1, 1, 1, 1))
VOCABULARY = """a an the one two of on in over under and with at to is are its
red green blue yellow orange purple white black grey brown big small tall old young bright dark
person man woman child girl boy dog cat bird horse rabbit bunny bear fish car bike bicycle bus train boat ball star
square circle triangle cup teacup teapot table chair house tree flower grass field forest road street path hill
mountain river lake sea sky cloud sun moon night day morning evening rain snow wind water fire light shadow
walks runs rides drives jumps falls turns looks smiles talks speaks stands sits moves rolls shatters breaks flies
slowly quickly left right up down forward back away toward through across around near far
camera video clip scene close wide shot view background foreground head face hand eye hair shirt""".split()


def main(folder: Path, seed: int = 0) -> None:
    """Writes dit, encoder and decoder.safetensors, their configs, text_encoder/ and tokenizer/ into `folder`."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in (("dit", AsymmDiT(DIT)), ("encoder", Encoder(ENCODER)), ("decoder", Decoder(DECODER))):
        save_file({key: t.to(torch.bfloat16) for key, t in model.state_dict().items()}, folder / f"{name}.safetensors")
    write_json(folder / "dit_config.json", asdict(DIT))
    write_json(folder / "vae_config.json", {"encoder": asdict(ENCODER), "decoder": asdict(DECODER)})
    _make_tokenizer(folder / "tokenizer")
    _make_text_encoder(folder / "text_encoder")


def _make_tokenizer(folder: Path) -> None:
    """Writes a unigram tokenizer with a small vocabulary, which splits other words into characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [("▁" + word, -3.0 - 0.001 * i) for i, word in enumerate(VOCABULARY)]
    characters = [(chr(code), -12.0) for code in range(33, 127)] + [("▁", -12.0)]
    tokenizer = Tokenizer(models.Unigram([*special, *words, *characters], unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=256
    )
    fast.save_pretrained(folder)


def _make_text_encoder(folder: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=384,
        d_model=DIT.t5_feat_dim,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    model = T5EncoderModel(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    model.bfloat16().save_pretrained(folder)
