"""The toy model before training: sizes, tokenizer and initial weights of its parts."""

import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mochi_tune.files import write_json
from mochi_tune.models.dit import AsymmDiT, AsymmetricJointBlock, DiTConfig
from mochi_tune.models.latents import TOKEN_PIXELS
from mochi_tune.models.vae import (
    CausalConv,
    Decoder,
    DecoderConfig,
    Downsample,
    Encoder,
    EncoderConfig,
    PointwiseConv,
    UpsampleBlock,
    frames_to_pixels,
)
from mochi_tune.toy.world import ALL_SHAPES, HEIGHT, WIDTH, all_words, draw_clips
from mochi_tune.training.draws import keyed_generator

if TYPE_CHECKING:
    from transformers import T5EncoderModel

CHANNELS = {"base_channels": 32, "channel_multipliers": (1, 1, 2, 3), "num_res_blocks": (0, 1, 1, 1, 0)}
ENCODER = EncoderConfig(**CHANNELS, has_attentions=(False, False, False, True, True))
DECODER = DecoderConfig(**CHANNELS)
DIT = DiTConfig(depth=4, num_heads=6, hidden_size_x=192, hidden_size_y=96, t5_feat_dim=64)
# Constants of the initial weights.
CONSTANT, BEGIN_LOGVAR, BEGIN_GATE = 8.0, -3.0, 0.3


class Autoencoder(nn.Module):
    """The toy model's VAE: encoder and decoder, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(ENCODER), Decoder(DECODER)


def build_vae(seed: int) -> Autoencoder:
    """Builds an autoencoder that is initially linear: it computes principal components, and residual branches are zero.

    With random weights, the norms would remove flat colours long before the model learns them.
    """
    torch.manual_seed(seed)
    vae = Autoencoder()
    for name, module in vae.named_modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            # The last layers of residual branches are zero; the others matter once these have changed.
            scale = 0.0 if name.endswith(("stack.5", "attn.out")) else 1.4 if isinstance(module, CausalConv) else 0.05
            nn.init.normal_(module.weight, std=scale * module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    words = all_words(ALL_SHAPES)
    generator = keyed_generator(seed, "components")
    pixels = frames_to_pixels(draw_clips([words[i] for i in range(0, len(words), 3)], generator))
    with torch.no_grad():
        begin_linear(vae.encoder, vae.decoder, pixels)
    nn.utils.convert_conv3d_weight_memory_format(vae, torch.channels_last_3d)
    return vae


def first_conv(decoder: Decoder) -> nn.Conv3d:
    """Returns the decoder's first layer, whose inputs are the latents."""
    return next(module for module in decoder.modules() if isinstance(module, nn.Conv3d))


def begin_linear(encoder: Encoder, decoder: Decoder, pixels: Tensor) -> None:
    """Sets all layers outside of the residual branches to principal components of blocks of `pixels`, level by level.

    Because x = silu(x) - silu(-x), layers in front of a SiLU output each feature with both signs. Each group of the
    encoder's last norm has a feature with both signs and a large constant, so that the norm divides by nearly a
    constant.
    """
    first, norm, out = encoder.layers[0], encoder.output_norm, encoder.output_proj
    assert isinstance(first, PointwiseConv)
    first.weight.zero_()
    first.weight[:3, :3] = torch.eye(3)
    downs = [module for module in encoder.modules() if isinstance(module, Downsample)]
    ups = [module.proj for module in decoder.modules() if isinstance(module, UpsampleBlock)][::-1]
    dim = decoder.config.latent_dim
    x = pixels
    for level, (down, up) in enumerate(zip(downs, ups, strict=True)):
        x = _begin_level(down, up, x, latent_dim=dim if level == len(downs) - 1 else None, is_first=level == 0)
    deviation = (2 / 9 * CONSTANT**2 + 2 / 3) ** 0.5  # of a group (f, -f, CONSTANT) whose f has unit variance
    norm.weight.fill_(deviation)
    norm.bias.fill_(CONSTANT / 3)
    norm.weight[2::3], norm.bias[2::3] = 0, 1
    out.weight.zero_()
    out.weight[:dim, : 3 * dim : 3], out.weight[:dim, 1 : 3 * dim : 3] = torch.eye(dim), -torch.eye(dim)
    constants = out.weight[dim:, 2::3]
    constants.fill_(BEGIN_LOGVAR / (constants.shape[1] * F.silu(torch.ones(())).item()))
    entry = first_conv(decoder)
    entry.weight.zero_()
    entry.weight[:dim, :, 0, 0, 0] = torch.eye(dim)
    decoder.output_proj.weight.zero_()
    decoder.output_proj.weight[:, :3], decoder.output_proj.weight[:, 3:6] = torch.eye(3), -torch.eye(3)


def _begin_level(down: Downsample, up: PointwiseConv, x: Tensor, latent_dim: int | None, is_first: bool) -> Tensor:
    """Sets a downsample layer and its inverse, an upsample layer, to principal components.

    Args:
        down: layer of the encoder.
        up: layer of the decoder.
        x: input features, (B, C, T, H, W).
        latent_dim: number of latent channels at the last level, where features get unit variance; None at the others.
        is_first: whether a SiLU and the output layer follow the upsample layer.

    Returns:
        The output features of the downsample layer.
    """
    assert down.bias is not None
    num_features = x.shape[1]
    t, s = down.kernel_size[0], down.kernel_size[1]
    x = F.pad(x, (0, 0, 0, 0, t - 1, 0), mode="replicate")
    blocks = x.unfold(2, t, t).unfold(3, s, s).unfold(4, s, s)  # (B, C, T, H, W, t, s, s)
    rows = blocks.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3)  # (blocks, C t s s)
    num_kept = min(rows.shape[1], latent_dim or down.out_channels)
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T.double() @ (rows - mean).double() / len(rows))
    basis = vectors[:, -num_kept:].flip(1).float()  # (C t s s, kept)
    scale = values[-num_kept:].flip(0).clamp(min=1e-6).sqrt().float() if latent_dim else torch.ones(num_kept)
    encode = basis.T / scale[:, None]
    codes = (rows - mean) @ encode.T

    kernel = encode.view(num_kept, num_features, t, s, s)
    target = slice(0, 3 * num_kept, 3) if latent_dim else slice(0, num_kept)
    down.weight[target, :num_features], down.bias[target] = kernel, -encode @ mean
    if latent_dim:
        down.weight[1 : 3 * num_kept : 3, :num_features] = -kernel
        down.bias[1 : 3 * num_kept : 3] = encode @ mean
        down.weight[2::3], down.bias[2::3] = 0, CONSTANT
    decode = (basis * scale).view(num_features, t, s, s, num_kept)
    shape = (up.out_features // (t * s * s), t, s, s)
    for i, sign in enumerate((1, -1) if is_first else (1,)):
        channels = slice(i * num_features, (i + 1) * num_features)
        up.weight.view(*shape, -1)[channels, ..., :num_kept] = sign * decode
        up.bias.view(shape)[channels] = sign * mean.view(num_features, t, s, s)
    return codes.view(*blocks.shape[:1], *blocks.shape[2:5], num_kept).permute(0, 4, 1, 2, 3)


def make_tokenizer(folder: Path) -> None:
    """Writes a unigram model of the world's words in the formats of sentencepiece and tokenizers.

    The model splits other words into letters. transformers 5.17 cannot read a sentencepiece model without a normalizer.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = sorted({word for words in all_words() for word in words.caption.split()})
    module: Any = sentencepiece_model_pb2  # generated code without annotations
    model = module.ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id = 0, 1, 2
    model.trainer_spec.bos_id = -1
    model.normalizer_spec.name = "identity"
    kind = model.SentencePiece
    pieces = [("<pad>", 0.0, kind.CONTROL), ("</s>", 0.0, kind.CONTROL), ("<unk>", 0.0, kind.UNKNOWN)]
    pieces += [("\u2581" + word, -3.0, kind.NORMAL) for word in words]
    pieces += [(letter, -12.0, kind.NORMAL) for letter in ("\u2581", *string.printable.strip())]
    for piece, score, type_ in pieces:
        model.pieces.add(piece=piece, score=score, type=type_)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.SerializeToString(deterministic=True))
    tokenizer = Tokenizer(models.Unigram([piece[:2] for piece in pieces], unk_id=2, byte_fallback=False))
    metaspace = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 256}
    config |= {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", config)


def build_text_encoder(vocabulary: int, seed: int) -> "T5EncoderModel":
    """Builds a tiny T5 encoder with random weights."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=DIT.t5_feat_dim,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def build_dit(seed: int) -> AsymmDiT:
    """Builds the DiT. Gates are initially small, and rotary positions turn by about one radian per token."""
    torch.manual_seed(seed)
    dit = AsymmDiT(DIT)
    for block in dit.blocks:
        assert isinstance(block, AsymmetricJointBlock)
        for mod in (block.mod_x, block.mod_y):
            nn.init.zeros_(mod.weight)
            nn.init.zeros_(mod.bias)
            width = mod.out_features // 4
            if mod.out_features > DIT.hidden_size_y:  # scale, gate, scale, gate; text of the last block has no gates
                mod.bias.data[width : 2 * width] = mod.bias.data[3 * width :] = BEGIN_GATE
    for parameter in (dit.final_layer.mod.weight, dit.final_layer.mod.bias, dit.final_layer.linear.weight):
        nn.init.zeros_(parameter)
    nn.init.zeros_(dit.final_layer.linear.bias)
    rows, columns = HEIGHT // TOKEN_PIXELS, WIDTH // TOKEN_PIXELS
    space = (192 * 192 / (rows * columns)) ** -0.5  # size of a token in the model's positions
    dit.pos_frequencies.data *= torch.tensor([1.0, space, space]).view(3, 1, 1)
    return dit
