"""What is said to a model that describes pictures, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: who speaks, the text, and pictures as JPEG, which belong in front of the text."""

    role: Literal["user", "assistant"]
    text: str
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: as it came, not yet checked.
        prompt_tokens: of the conversation and its pictures; 0 where that is not told.
        completion_tokens: of the answer; 0 where that is not told.
        is_cut_off: the model had no tokens left.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_cut_off: bool = False


class TryAgain(Exception):
    """A request that may succeed when it is made again.

    Args:
        reason: what happened, to stand behind a colon.
        after_seconds: how long the endpoint wants to be left alone; None: it did not say.
        is_lost: no answer came at all.
        is_throttled: the endpoint has too many requests, whoever makes them.
    """

    def __init__(
        self, reason: str, after_seconds: float | None = None, is_lost: bool = False, is_throttled: bool = False
    ) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds
        self.is_lost = is_lost
        self.is_throttled = is_throttled


class Captioner(Protocol):
    """A model that answers a conversation, wherever it runs."""

    def check(self) -> list[str]:
        """Returns lines for the user; raises ConfigError where no request could succeed."""
        ...

    def ask(self, turns: Sequence[Turn], seconds: float) -> Answer:
        """Answers a conversation within so many seconds.

        Raises:
            TryAgain: the request failed and may succeed the next time.
            DataError: this conversation is refused.
            ConfigError: every conversation would be refused.
        """
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...
