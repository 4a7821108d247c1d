"""The standard streams of a program that is started by a scheduler, a service or a pipe: closed, or closed at last."""

import contextlib
import io
import os
import select
import sys
from typing import TextIO


def open_missing_streams() -> None:
    """Opens /dev/null for each standard stream that was closed; the next files would get their numbers otherwise."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is given, which is this one.
            assert os.open(os.devnull, os.O_RDWR) == number
            setattr(sys, name, os.fdopen(number, mode))


def slow_bars() -> None:
    """Has tqdm draw its bars every 5 seconds where it is no terminal: a log file keeps each drawing."""
    if not sys.stderr.isatty():
        # Read by tqdm when it is imported.
        os.environ.setdefault("TQDM_MININTERVAL", "5")
        os.environ.setdefault("TQDM_MAXINTERVAL", "30")


def is_reader_gone() -> bool:
    """Whether what is written has no reader any more, as behind `| head`."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def drop_output() -> None:
    """Gives up what could not be written, which Python would try to write once more when it ends, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


class PatientStream(io.TextIOBase):
    """A standard stream of a long run: what cannot be written, as the disk is full or the reader gone, is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._is_terminal = stream.isatty()

    @classmethod
    def use(cls) -> None:
        """Puts one in the place of stdout and of stderr, where these are files, pipes or terminals."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            with contextlib.suppress(OSError):  # Something else than that has no number.
                stream.flush()
                stream.fileno()
                setattr(sys, name, cls(stream))

    @property
    def encoding(self) -> str:
        """That of the stream."""
        return self.stream.encoding

    def fileno(self) -> int:
        """Returns the stream's number."""
        return self.stream.fileno()

    def isatty(self) -> bool:
        """Whether a person is looking."""
        return self._is_terminal

    def write(self, text: str) -> int:
        """Writes at once, past Python's buffers, which would keep what failed for the end and complain then."""
        with contextlib.suppress(OSError):
            os.write(self.fileno(), text.encode(self.encoding, "replace"))
        return len(text)
