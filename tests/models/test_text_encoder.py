from pathlib import Path

import pytest
import torch
from helpers_golden import TOLERANCE, relative_error
from torch.multiprocessing.reductions import StorageWeakRef

from mochi_tune import assets
from mochi_tune.models.text_encoder import MAX_TOKENS, may_be_cut, measure_caption
from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.t5 import build_t5, read_t5_config

TINY = Path(assets.__path__[0]) / "tiny"


@pytest.fixture(scope="module")
def encoder():
    return WeightsFolder(TINY).load_text_encoder("cpu", torch.float32)


def test_features_are_those_of_the_padded_and_masked_encoder(encoder):
    prompts = ["a red ball rolls over the hill", "a dog"]
    padded = encoder.tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        reference = encoder.model(padded.input_ids, attention_mask=padded.attention_mask).last_hidden_state
    for row, features in enumerate(encoder.encode(prompts)):
        valid = padded.attention_mask[row].bool()
        assert features.dtype == torch.float32 and features.shape == (int(valid.sum()), encoder.width)
        assert relative_error(features, reference[row, valid]) <= TOLERANCE


def test_the_empty_prompt_has_no_valid_token_row_by_row(encoder):
    alone = encoder.encode(["a cat"])[0]
    for prompts in (["", "a cat"], ["a cat", ""]):
        features = encoder.encode(prompts)
        assert features[prompts.index("")].shape == (0, encoder.width)
        assert torch.equal(features[prompts.index("a cat")], alone)


def test_long_prompts_are_cut_and_counted_whole(encoder):
    prompt = " ".join(["ball"] * 400)
    assert encoder.count_tokens(prompt) == 401
    [features] = encoder.encode([prompt])
    assert features.shape[0] == MAX_TOKENS
    # A cut prompt still ends with the end token.
    tokens = encoder.tokenizer(prompt, verbose=False).input_ids
    kept = torch.tensor([[*tokens[: MAX_TOKENS - 1], encoder.tokenizer.eos_token_id]])
    assert relative_error(features, encoder.model(kept).last_hidden_state[0]) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_features_are_fp32_whatever_t5_computes_in(encoder, dtype):
    half = WeightsFolder(TINY).load_text_encoder("cpu", dtype)
    assert half.model.dtype == torch.bfloat16
    matrices = [module for module in half.model.encoder.block.modules() if isinstance(module, torch.nn.Linear)]
    assert {matrix.weight.dtype for matrix in matrices} == {dtype}
    for ours, exact in zip(half.encode(["a cat", ""]), encoder.encode(["a cat", ""]), strict=True):
        assert ours.dtype == torch.float32 and ours.shape == exact.shape
        assert torch.allclose(ours, exact, atol=0.05 * exact.abs().max().item() if len(exact) else 0.0)


def test_in_8_bits_a_block_is_rounded_before_the_next_one_is_read():
    config = read_t5_config(TINY / "text_encoder" / "config.json")
    read: dict[str, StorageWeakRef] = {}

    def write(name: str, tensor: torch.Tensor) -> None:
        if name.startswith("encoder.block.1."):
            wide = [other for other, ref in read.items() if other.startswith("encoder.block.0.") and not ref.expired()]
            assert all(other.endswith(("layer_norm.weight", "relative_attention_bias.weight")) for other in wide), wide
        tensor.normal_()
        read[name] = StorageWeakRef(tensor.untyped_storage())

    build_t5(config, write, "cpu", torch.int8)
    assert any(name.startswith("encoder.block.1.") for name in read)


@pytest.mark.parametrize("num_characters", [254, 255, 400])
def test_where_a_caption_is_cut_is_known_to_the_character(encoder, num_characters):
    # Each "q" is a token. The leading space that T5 adds and the end token are the other two.
    text = "q" * num_characters
    caption = measure_caption(text, encoder.tokenizer)
    assert caption.num_tokens == num_characters + 2 and caption.num_read == 254
    assert may_be_cut(text) == (caption.num_tokens > MAX_TOKENS)
