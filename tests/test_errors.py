"""What an error says goes to a terminal and into a log: one line, and nothing that moves the cursor."""

from mochi_tune.errors import DataError, printable, some


def test_what_a_terminal_obeys_is_written_out():
    assert printable("a\nb\x1b[1m ü\u202e") == "a b\\x1b[1m ü\\u202e"
    assert str(DataError("odd\x07.mp4: is damaged")) == "odd\\x07.mp4: is damaged"
    # Two names that differ in such a space would look the same.
    assert printable("3.45\u202fPM\xa0\u3000.mov") == "3.45\\u202fPM\\xa0\\u3000.mov"
    assert printable("a\tb\u2028c") == "a b c"
    assert some(["x\ny", "z"]) == "x y, z"
