from pathlib import Path

import pytest
import torch

from mochi_tune import assets
from mochi_tune.models.text_encoder import MAX_TOKENS, TextEncoder, pad_prompts

TINY = Path(assets.__path__[0]) / "tiny"


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder.load(TINY, "cpu", torch.float32)


def test_features_are_those_of_the_padded_and_masked_encoder(encoder):
    prompts = ["a red ball rolls over the hill", "a dog"]
    padded = encoder.tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        reference = encoder.model(padded.input_ids, attention_mask=padded.attention_mask).last_hidden_state
    for row, features in enumerate(encoder.encode(prompts)):
        valid = padded.attention_mask[row].bool()
        assert features.dtype == torch.float32 and features.shape == (int(valid.sum()), encoder.width)
        assert torch.allclose(features, reference[row, valid], atol=1e-5)


def test_the_empty_prompt_has_no_valid_token_row_by_row(encoder):
    alone = encoder.encode(["a cat"])[0]
    for prompts in (["", "a cat"], ["a cat", ""]):
        features = encoder.encode(prompts)
        assert features[prompts.index("")].shape == (0, encoder.width)
        assert torch.equal(features[prompts.index("a cat")], alone)


def test_long_prompts_are_cut_and_counted_whole(encoder):
    prompt = " ".join(["ball"] * 400)
    assert encoder.count_tokens(prompt) == 401
    assert encoder.encode([prompt])[0].shape[0] == MAX_TOKENS


def test_pad_prompts_marks_the_valid_tokens(encoder):
    embeds, mask = pad_prompts(encoder.encode(["a cat", "", "a red ball"]))
    assert embeds.shape == (3, 4, encoder.width)
    assert mask.sum(1).tolist() == [3, 0, 4] and not embeds[~mask].any()
