"""Checks and loads the files of T5's tokenizer; the library that reads them accepts damaged ones silently."""

from pathlib import Path
from typing import Any

from mochi_tune.errors import CheckpointError, name_stand_in
from mochi_tune.files import read_json
from mochi_tune.models.text_encoder import load_tokenizer

# Tokens 0, 1 and 2 of every T5.
_FIRST_TOKENS = ["<pad>", "</s>", "<unk>"]


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Refuses a tokenizer with damaged files, or one that does not belong to this T5.

    Args:
        folder: folder of the tokenizer.
        vocab_size: number of rows of T5's embedding; the tokenizer may have fewer tokens.

    Raises:
        CheckpointError: a file is incomplete, empty, of another kind or that of another tokenizer.
    """
    vocabularies = {}
    for path in sorted(folder.glob("*.json")):
        values = read_json(path)
        if path.name == "tokenizer.json":
            vocabularies[path] = _unigram_tokens(values)
    for path in folder.glob("*.model"):
        content = path.read_bytes()
        if what := name_stand_in(content) or ("" if content.strip(b"\0") else "empty"):
            raise CheckpointError(f"{path} is not a tokenizer, it is {what}: delete it and fetch it again.")
        vocabularies[path] = _sentencepiece_tokens(content)
    for path, tokens in vocabularies.items():
        if tokens[:3] != _FIRST_TOKENS or len(tokens) > vocab_size:
            has = f"{len(tokens)} tokens, from {' '.join(tokens[:3])} on" if tokens else "no tokens of a Unigram model"
            raise CheckpointError(
                f"{path} is not this T5's tokenizer: it has {has}, and T5 has at most {vocab_size}, from "
                f"{' '.join(_FIRST_TOKENS)} on. Use the tokenizer that belongs to the T5."
            )


def open_tokenizer(folder: Path) -> Any:
    """Loads T5's tokenizer, also from spiece.model alone, which transformers does not recognise as T5's."""
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return load_tokenizer(folder)
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(folder, local_files_only=True)


def _unigram_tokens(values: dict) -> list[str]:
    """Returns the tokens of a tokenizer.json, or [] if its format is not that of T5.

    Source: huggingface/tokenizers, models/unigram/serialization.rs: "vocab" is a list of [token, score].
    """
    model = values.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, list) or not all(isinstance(each, list) and each for each in vocabulary):
        return []
    return [str(each[0]) for each in vocabulary]


def _sentencepiece_tokens(content: bytes) -> list[str]:
    """Returns the tokens of a sentencepiece model, or [] if the file is not one.

    Source: google/sentencepiece, sentencepiece_model.proto: ModelProto begins with its `pieces`, field 1, each of which
    begins with its `piece`, field 1 too; a field of text is its tag, 0x0A for field 1, its length and its bytes.
    """
    tokens, at = [], 0
    while content[at : at + 1] == b"\n":
        size, start = _varint(content, at + 1)
        length, text = _varint(content, start + 1)
        if content[start : start + 1] != b"\n" or start + size > len(content):
            return []
        tokens.append(content[text : text + length].decode(errors="replace"))
        at = start + size
    return tokens


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Returns a varint of a protocol buffer, with 7 bits per byte, lowest first, and the position after it."""
    value, shift = 0, 0
    while at < len(content):
        value |= (content[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if content[at - 1] < 0x80:
            break
    return value, at
