"""Standard streams that are closed, or closed later, because a scheduler, a service or a pipe started the program."""

import contextlib
import io
import os
import select
import sys
from typing import TextIO


def open_missing_streams() -> None:
    """Opens /dev/null for each closed standard stream. Otherwise the next opened files would get their numbers."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            # The system returns the lowest free number, which is this one.
            assert os.open(os.devnull, os.O_RDWR) == number
            setattr(sys, name, os.fdopen(number, mode))


def slow_bars() -> None:
    """Makes tqdm draw its bars every 5 seconds if stderr is not a terminal: a log file keeps each drawing."""
    if not sys.stderr.isatty():
        # tqdm reads these when it is imported.
        os.environ.setdefault("TQDM_MININTERVAL", "5")
        os.environ.setdefault("TQDM_MAXINTERVAL", "30")


def is_reader_gone() -> bool:
    """Whether the reader of the output is gone, as behind `| head`."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def drop_output() -> None:
    """Discards buffered output that could not be written; Python would retry at exit and report an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


class PatientStream(io.TextIOBase):
    """A standard stream that drops output it cannot write, because the disk is full or the reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._is_terminal = stream.isatty()

    @classmethod
    def use(cls) -> None:
        """Replaces stdout and stderr if they are files, pipes or terminals."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            with contextlib.suppress(OSError):  # Other streams have no file number.
                stream.flush()
                stream.fileno()
                setattr(sys, name, cls(stream))

    @property
    def encoding(self) -> str:
        """The encoding of the stream."""
        return self.stream.encoding

    def fileno(self) -> int:
        """Returns the file number of the stream."""
        return self.stream.fileno()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._is_terminal

    def write(self, text: str) -> int:
        """Writes without Python's buffers, which would retry failed output at exit and report an error."""
        with contextlib.suppress(OSError):
            os.write(self.fileno(), text.encode(self.encoding, "replace"))
        return len(text)
