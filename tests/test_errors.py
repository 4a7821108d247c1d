"""What an error says goes to a terminal and into a log: one line, and nothing that moves the cursor."""

import pytest

from mochi_tune.errors import DataError, find_lone_surrogate, format_bytes, printable, some


def test_what_a_terminal_obeys_is_written_out():
    assert printable("a\nb\x1b[1m ü\u202e") == "a b\\x1b[1m ü\\u202e"
    assert str(DataError("odd\x07.mp4: is damaged")) == "odd\\x07.mp4: is damaged"
    # Two names that differ in such a space would look the same.
    assert printable("3.45\u202fPM\xa0\u3000.mov") == "3.45\\u202fPM\\xa0\\u3000.mov"
    assert printable("a\tb\u2028c") == "a b c"
    assert some(["x\ny", "z"]) == "x y, z"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 kB"), (1234, "1.23 kB"), (999_000, "999 kB"), (3 * 2**20, "3 MiB"), (5 * 2**29, "2.5 GiB")],
)
def test_a_size_has_the_unit_that_fits(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_a_lone_surrogate_is_found():
    assert find_lone_surrogate("a 🎬 cat") is None
    assert find_lone_surrogate("a \udc00 \ud83d") == "\\udc00"
