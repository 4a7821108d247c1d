"""T5's tokenizer from spiece.model and from tokenizer.json."""

import io
import json

import pytest
import sentencepiece
from helpers_weights import TINY

from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.paths import WeightsPaths

PROMPTS = [
    "a cat on the hill.", " lead  spaces ", "x </s> y", "ﬁ ½ é 漢字", "<extra_id_0> cat<extra_id_7>", "two\nlines",
    "a " * 300, "",
]  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary():
    """The spiece.model of a small T5."""
    words = "a cat dog red ball runs on the hill under blue sky while some camera slowly pans over an old man".split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 9)) + "é½.!"[i % 4] for i in range(400)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=120, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
    )  # fmt: skip
    return out.getvalue()


def test_spiece_model_alone_gives_the_ids_of_the_whole_folder(tmp_path, vocabulary):
    opened = []
    extra = [f"<extra_id_{i}>" for i in range(100)]
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": extra}
    configs = {
        "special_tokens_map.json": special,
        "tokenizer_config.json": special | {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "legacy": True},
    }
    for name, files in (("whole", configs), ("alone", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spiece.model").write_bytes(vocabulary)
        for file, values in files.items():
            (tmp_path / name / file).write_text(json.dumps(values))
        weights = WeightsFolder(WeightsPaths(TINY, tokenizer=tmp_path / name))
        weights.check(["text_encoder"])
        opened.append(weights.load_tokenizer())
    for prompt in PROMPTS:
        whole, alone = (each(prompt, max_length=256, truncation=True, return_offsets_mapping=True) for each in opened)
        assert whole.input_ids == alone.input_ids and whole.offset_mapping == alone.offset_mapping, prompt
