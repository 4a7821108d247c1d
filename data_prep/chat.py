"""Conversations with a model that describes pictures: turns, answers, and the interface of the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: its role, text, and JPEG pictures, which precede the text."""

    role: Literal["user", "assistant"]
    text: str
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The answer of a model.

    Attributes:
        text: unchecked.
        prompt_tokens: of the conversation and its pictures; 0 if unknown.
        completion_tokens: of the answer; 0 if unknown.
        is_cut_off: whether the model reached the maximum number of tokens.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_cut_off: bool = False


class TryAgain(Exception):
    """Raised when a request failed but may succeed on a retry.

    Args:
        reason: of the failure, for messages.
        after_seconds: minimum pause that the endpoint asks for; None if it does not.
        is_lost: whether no answer came at all.
        is_throttled: whether the endpoint has too many requests.
    """

    def __init__(
        self, reason: str, after_seconds: float | None = None, is_lost: bool = False, is_throttled: bool = False
    ) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds
        self.is_lost = is_lost
        self.is_throttled = is_throttled


class Captioner(Protocol):
    """A model that answers conversations, at an endpoint or in this process."""

    def check(self) -> list[str]:
        """Checks the model; returns lines for the user.

        Raises:
            ConfigError: no request could succeed.
        """
        ...

    def ask(self, turns: Sequence[Turn], seconds: float) -> Answer:
        """Answers a conversation in at most `seconds`.

        Raises:
            TryAgain: the request failed and may succeed on a retry.
            DataError: this conversation is refused.
            ConfigError: every conversation would be refused.
        """
        ...

    def close(self) -> None:
        """Frees the model or closes the connections."""
        ...
