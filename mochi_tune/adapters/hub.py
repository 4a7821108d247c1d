"""Timeouts of requests to the hub.

They are in this room because it is the lowest one that sends such requests.
"""

import contextlib
from collections.abc import Iterator

# Maximum seconds without a byte from the hub; some calls of its library would wait forever.
TIMEOUT_SECONDS = 30


@contextlib.contextmanager
def answered_within(seconds: float) -> Iterator[None]:
    """Sets the timeout of huggingface_hub's requests within the context; a transfer that progresses has no limit.

    Args:
        seconds: maximum to connect, and between two parts of what is sent or received.
    """
    from huggingface_hub import get_session

    session = get_session()
    before, session.timeout = session.timeout, seconds
    try:
        yield
    finally:
        session.timeout = before
