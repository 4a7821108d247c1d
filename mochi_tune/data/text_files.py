"""Reads text files of captions, prompts and tables in the encodings that people have."""

import codecs
import unicodedata
from pathlib import Path

_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(path: Path, fallback: str | None = None) -> tuple[str, str]:
    """Reads a text file in UTF-8, or in UTF-16 with a byte order mark.

    Args:
        path: the file.
        fallback: a one-byte encoding for a file that is not UTF-8. It is used only if it gives no control characters,
            as it would for an image or an archive.

    Returns:
        The text without its byte order mark and with "\\n" as line ends, and the name of the encoding.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: the file has none of these encodings.
    """
    text, encoding = _read_encoded(path, fallback)
    return text.replace("\r\n", "\n").replace("\r", "\n"), encoding


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a UTF-8 or UTF-16 file; only "\\n" and "\\r\\n" end a line. Raises as `read_text`."""
    return [line.removesuffix("\r") for line in _read_encoded(path, None)[0].split("\n")]


def _read_encoded(path: Path, fallback: str | None) -> tuple[str, str]:
    """Returns a text with the line ends of the file but no byte order mark, and the name of its encoding."""
    content = path.read_bytes()
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding), encoding
    except UnicodeDecodeError:
        if fallback is None or encoding != "utf-8" or (decoded := _decode_printable(content, fallback)) is None:
            raise
        return decoded, fallback


def _decode_printable(content: bytes, encoding: str) -> str | None:
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        return None
    is_printable = all(unicodedata.category(c) != "Cc" or c in "\t\n\r\f" for c in set(text))
    return text if is_printable else None
