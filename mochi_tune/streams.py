"""The standard streams of a program that is started by a scheduler, a service or a pipe: closed, or closed at last."""

import os
import select
import sys


def open_missing_streams() -> None:
    """Opens /dev/null for each standard stream that was closed; the next files would get their numbers otherwise."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is given, which is this one.
            assert os.open(os.devnull, os.O_RDWR) == number
            setattr(sys, name, os.fdopen(number, mode))


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
