"""The tokenizer's files: checked without the library that reads them, which takes any of them in silence."""

from pathlib import Path
from typing import Any

from mochi_tune.errors import CheckpointError
from mochi_tune.files import name_stand_in, read_json
from mochi_tune.models.text_encoder import load_tokenizer

# The ids 0, 1 and 2 of every T5.
FIRST_TOKENS = ["<pad>", "</s>", "<unk>"]


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Refuses a tokenizer whose files are cut off, empty, not what their names say, or not those of this T5.

    Args:
        folder: tokenizer/ of a weights folder.
        vocab_size: rows of T5's embedding; it may have more of them than the tokenizer has tokens.

    Raises:
        CheckpointError: naming the file.
    """
    vocabularies = {}
    for path in sorted(folder.glob("*.json")):
        values = read_json(path)
        if path.name == "tokenizer.json":
            vocabularies[path] = _unigram_tokens(values)
    for path in folder.glob("*.model"):
        content = path.read_bytes()
        if what := name_stand_in(content) or ("" if content.strip(b"\0") else "empty"):
            raise CheckpointError(f"{path} is no tokenizer, it is {what}: delete it and fetch it again.")
        vocabularies[path] = _sentencepiece_tokens(content)
    for path, tokens in vocabularies.items():
        if tokens[:3] != FIRST_TOKENS or len(tokens) > vocab_size:
            has = f"{len(tokens)} tokens, from {' '.join(tokens[:3])} on" if tokens else "no tokens of a Unigram model"
            raise CheckpointError(
                f"{path} is not this T5's tokenizer: it has {has}, and T5 has at most {vocab_size}, from "
                f"{' '.join(FIRST_TOKENS)} on. Use the tokenizer that belongs to the T5."
            )


def open_tokenizer(folder: Path) -> Any:
    """Loads T5's tokenizer, also of spiece.model alone, in which transformers does not know it for T5's."""
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return load_tokenizer(folder)
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(folder, local_files_only=True)


def _unigram_tokens(values: dict) -> list[str]:
    """Returns the tokens of a tokenizer.json, none where it has not the form of T5's.

    Source: huggingface/tokenizers, models/unigram/serialization.rs: "vocab" is a list of [token, score].
    """
    model = values.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, list) or not all(isinstance(each, list) and each for each in vocabulary):
        return []
    return [str(each[0]) for each in vocabulary]


def _sentencepiece_tokens(content: bytes) -> list[str]:
    """Returns the tokens of a sentencepiece model, none where it is no such file.

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
    """Returns a number of a protocol buffer, 7 bits a byte with the lowest first, and where it ends."""
    value, shift = 0, 0
    while at < len(content):
        value |= (content[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if content[at - 1] < 0x80:
            break
    return value, at
