import pytest

from mochi_tune.data.text_files import read_text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ("", "utf-8")),
        ("Käse\r\nb\rc\n\u2028".encode(), ("Käse\nb\nc\n\u2028", "utf-8")),
        ("Käse".encode("utf-8-sig"), ("Käse", "utf-8-sig")),
        (b"\xff\xfe" + "Käse".encode("utf-16-le"), ("Käse", "utf-16")),
        (b"\xfe\xff" + "Käse".encode("utf-16-be"), ("Käse", "utf-16")),
        ("“Käse”\xa0–\xad".encode("cp1252"), ("“Käse”\xa0–\xad", "cp1252")),
    ],
)
def test_a_text_is_read_in_its_encoding(tmp_path, content, expected):
    (tmp_path / "x").write_bytes(content)
    assert read_text(tmp_path / "x", fallback="cp1252") == expected


@pytest.mark.parametrize("content", [b"K\xe4se\x01", b"\x81", b"\xff\xfea", b"\xef\xbb\xbf\xe4", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_not_text_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "x", fallback="cp1252")


def test_without_a_fallback_only_unicode_is_read(tmp_path):
    (tmp_path / "x").write_bytes("Käse".encode("cp1252"))
    with pytest.raises(UnicodeDecodeError) as info:
        read_text(tmp_path / "x")
    assert info.value.start == 1
