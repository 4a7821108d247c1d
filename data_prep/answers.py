"""Turns a model's answer into a caption: removes everything around it, and finds faults in it."""

import re
import unicodedata
from typing import Any, Literal

from mochi_tune.files import parse_object
from mochi_tune.models.text_encoder import MAX_TOKENS, measure_caption

Language = Literal["en", "any"]
# Maximum characters, beyond which the model did not stop, and minimum words of a caption.
_MAX_CHARACTERS, _MIN_WORDS = 8000, 3
# Maximum words if T5's tokenizer is missing: English prose has 1.3 tokens per word, names and numbers more.
MAX_WORDS_UNCOUNTED = 160
# Minimum share of Latin letters, and of words that are among the most frequent English ones, which are a third of
# English prose; the latter is checked from a minimum number of words.
_MIN_LATIN, _MIN_COMMON, _MIN_WORDS_TOLD = 0.9, 0.1, 12
_COMMON = frozenset("the a an and of in with is are to on as at its it from by while for this that over into".split())
_FOREIGN = frozenset(
    "de la le les des du et un une el los las y una con der das und ein eine den dem een het en il di che della uma o "
    "os da em para och det ett att".split()
)
# A text of at least this many words with a smaller share of distinct words comes from a model in a loop.
_LOOP_WORDS, _MIN_DISTINCT = 40, 0.2
# Factor on the words to ask for when shortening, as models count badly.
_SHORTER = 0.85

_THOUGHTS = re.compile(r"^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"^```\w*\n(.*?)\n?```$", re.DOTALL)
_HEADING = re.compile(r"^(?:#{1,6} [^\n]*|\*\*[^*\n]+\*\*:?)\n+")
_EMPHASIS = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1")
_PREAMBLE = re.compile(
    r"^(?:(?:sure|certainly|of course|absolutely|okay|ok)\b[^\w\n]*)?"
    r"(?:here(?:'s|’s| is| are)\b[^\n:.]{0,120}:|(?:caption|description|video caption|video description) ?:)\s*",
    re.IGNORECASE,
)
_FAREWELL = re.compile(r"\n\s*\n(?:let me know|i hope|would you like|feel free|if you)\b[^\n]*$", re.IGNORECASE)
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»"}
_LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_REFUSAL = re.compile(
    r"^(?:i['’]m sorry|i am sorry|sorry,|i apologi[sz]e|i can(?:['’]t|not)\b|i['’]m (?:unable|not able)|"
    r"i am (?:unable|not able)|as an ai\b|unfortunately, i\b)|"
    r"\bi (?:can['’]t|cannot|am unable to|['’]m unable to) (?:assist|help|view|see|describe|provide)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?][\"”’)]*(?=\s|$)")


def clean_answer(text: str) -> str:
    """Returns an answer on one line, without a model's thoughts, a code fence, a heading, a preamble or quotes."""
    text = _THOUGHTS.sub("", text).strip()
    if len(text) > _MAX_CHARACTERS:
        return text
    text = _FENCE.sub(r"\1", text).strip()
    text = _HEADING.sub("", text)
    text = _EMPHASIS.sub(r"\2", text)
    text = _FAREWELL.sub("", _PREAMBLE.sub("", text)).strip()
    close = _QUOTES.get(text[:1])
    if close and len(text) > 1 and text.endswith(close) and text[0] not in text[1:-1] and close not in text[1:-1]:
        text = text[1:-1]
    if len(_LIST.findall(text)) > 1:
        # Keep the lines, for `find_fault` to recognize the list.
        return text
    return " ".join(text.split())


def find_fault(text: str, language: Language) -> str:
    """Returns why a cleaned answer is not a caption, as a predicate of "it"; "" if it is one.

    Args:
        text: result of `clean_answer`.
        language: "en" also checks the letters and the most frequent words.
    """
    if not text:
        return "is empty"
    if len(text) > _MAX_CHARACTERS:
        return f"has {len(text)} characters"
    # Not category Cf: characters that join letters are text.
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Co", "Cn") and letter not in "\n\t" for letter in text):
        return "contains characters that are not text"
    if text.lower().startswith(("<think", "<!doctype", "<html")):
        return "has only thoughts" if text.lower().startswith("<think") else "is a web page"
    if parse_object(text) is not None or text.startswith(("```", "[{")):
        return "is code or JSON"
    if _REFUSAL.search(text):
        return "is a refusal"
    if len(_LIST.findall(text)) > 1:
        return "is a list"
    words = re.findall(r"\w+", text.lower())
    if len(words) >= _LOOP_WORDS and len(set(words)) < _MIN_DISTINCT * len(words):
        return "repeats itself"
    if language == "en" and (fault := _find_foreign(text, words)):
        return fault
    if len(words) < _MIN_WORDS:
        return f"has only {len(words)} words"
    return ""


def _find_foreign(text: str, words: list[str]) -> str:
    letters = [letter for letter in text if letter.isalpha()]
    # U+024F is the last Latin letter with an accent.
    latin = sum(letter <= "\u024f" for letter in letters)
    if latin < _MIN_LATIN * len(letters) or not letters:
        return f"is not English: {latin} of its {len(letters)} letters are Latin"
    common = sum(word in _COMMON for word in words)
    foreign = sum(word in _FOREIGN for word in words)
    if len(words) >= _MIN_WORDS_TOLD and common < max(_MIN_COMMON * len(words), foreign):
        return f"is not English: {common} of its {len(words)} words are frequent English ones"
    return ""


class CaptionLength:
    """Checks whether a caption fits the maximum length of T5, in tokens or, without a tokenizer, in words.

    Args:
        tokenizer: of T5; None if it is missing.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer

    def fits(self, text: str) -> bool:
        """Whether T5 reads the whole caption."""
        return self._size(text) <= self._most

    def words_to_ask_for(self, text: str) -> int:
        """Returns the number of words to ask for when shortening a caption."""
        return max(int(len(text.split()) * self._most / self._size(text) * _SHORTER), 10)

    def describe(self, text: str) -> str:
        """Returns a caption's length and the maximum, for messages."""
        unit = "words, counted without T5's tokenizer" if self._tokenizer is None else "tokens"
        return f"{self._size(text)} {unit}, the maximum is {self._most}"

    def cut(self, text: str) -> str:
        """Returns the longest beginning of whole sentences that fits, else of whole words."""
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        # In descending order of length: the first that fits is the longest.
        spaces = [match.start() for match in re.finditer(r"\s", text)]
        candidates = (text[:end] for end in (*reversed(ends), *reversed(spaces)))
        return next((candidate for candidate in candidates if self.fits(candidate)), "")

    @property
    def _most(self) -> int:
        return MAX_WORDS_UNCOUNTED if self._tokenizer is None else MAX_TOKENS

    def _size(self, text: str) -> int:
        return len(text.split()) if self._tokenizer is None else measure_caption(text, self._tokenizer).num_tokens or 0
