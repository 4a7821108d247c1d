"""What all questions to the hub share: how long an answer may take, and what is told of a failure.

It is in this room as the lowest one that asks the hub.
"""

import contextlib
from collections.abc import Iterator

# Without a byte from the hub. Its library waits for ever in some of its calls.
TIMEOUT_SECONDS = 30


@contextlib.contextmanager
def answered_within(seconds: float) -> Iterator[None]:
    """Ends each of huggingface_hub's requests that makes no progress for so long; what goes on may take any time.

    Args:
        seconds: to connect, and between two parts of what is sent or received.
    """
    from huggingface_hub import get_session

    session = get_session()
    before, session.timeout = session.timeout, seconds
    try:
        yield
    finally:
        session.timeout = before


def one_line(error: BaseException) -> str:
    """Returns an error's text without line breaks and without its HTTP library's advice."""
    text = " ".join(str(error).split()).partition(" For more information")[0]
    return text[:200] or type(error).__name__
