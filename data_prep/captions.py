"""Reads captions of clips: from the text file next to each, else from a table in its folder or above."""

import hashlib
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mochi_tune.config.schema import DataConfig
from mochi_tune.config.sources import Source
from mochi_tune.data.text_files import read_text
from mochi_tune.data_prep.caption_tables import TableRow, find_lists, read_tables
from mochi_tune.data_prep.finding import suffix_of, walk
from mochi_tune.errors import DataError, find_lone_surrogate, some

# In any case; the first that exists is used. .caption is the default of kohya's scripts.
SIDECAR_SUFFIXES = (".txt", ".caption")
# Many times the length of 256 tokens; a longer text is not a caption.
MAX_CAPTION_CHARACTERS = 50_000
# Larger caption files are not read.
_MAX_SIDECAR_BYTES = 64 * 2**20


@dataclass(frozen=True)
class CaptionRules:
    """How a clip's captions are made from the texts of its files.

    Attributes:
        split: "one": a .txt file is one caption; "lines": each line is one.
        prefix: text before each caption that is not empty.
        suffix: text after each caption that is not empty.
        tag_dropout: probability, in [0, 1), of dropping each tag except the first.
        variants: number of times that tags are drawn for each caption.
        seed: of the draws.
    """

    split: Literal["one", "lines"] = "one"
    prefix: str = ""
    suffix: str = ""
    tag_dropout: float = 0.0
    variants: int = 1
    seed: int = 0

    @classmethod
    def from_config(cls, data: DataConfig, source: Source, seed: int) -> "CaptionRules":
        """Returns the rules that the settings give for a source."""
        return cls(
            data.captions, source.caption_prefix, data.caption_suffix, data.tag_dropout, data.caption_variants, seed
        )


@dataclass(frozen=True)
class Captions:
    """The captions of a folder's videos.

    Attributes:
        texts: captions of each video that has any: at least one, none empty, distinct, in order.
        refused: why a video's caption cannot be used, by video.
        notes: lines for the user.
    """

    texts: dict[Path, tuple[str, ...]]
    refused: dict[Path, str]
    notes: tuple[str, ...]


def load_captions(folder: Path, videos: list[Path], rules: CaptionRules) -> Captions:
    """Reads the captions of each video. Videos without a caption, or with an empty one, are not in `texts`.

    NAME.txt next to NAME.mp4 overrides the rows of tables. Several rows for one video are several captions.

    Args:
        folder: to search for tables, with its subfolders.
        videos: paths in or below `folder`.
        rules: how captions are made from the texts.

    Raises:
        DataError: a table cannot be read as one, or none of its rows names a video.
    """
    tables = read_tables(folder, videos)
    sidecars = _find_sidecars(videos)
    texts, refused, read_as_cp1252, links = {}, {}, [], []
    for video in videos:
        try:
            found: list[str] = []
            if video in sidecars:
                found, encoding = _read_sidecar(sidecars[video], video, rules.split)
                if _leads_out(sidecars[video], video, folder):
                    links.append(f"{sidecars[video]} -> {os.path.realpath(sidecars[video])}")
                if encoding == "cp1252":
                    read_as_cp1252.append(sidecars[video].relative_to(folder).as_posix())
            found = found or _row_texts(video, tables.rows.get(video, []))
            captions = apply_rules(found, rules, video.relative_to(folder).as_posix())
        except DataError as error:
            refused[video] = str(error)
            continue
        if captions:
            texts[video] = captions
    notes = list(tables.notes)
    if read_as_cp1252:
        names = some(read_as_cp1252, limit=10)
        notes.append(f"captions that are not UTF-8, read as cp1252; save them as UTF-8 if letters are wrong: {names}")
    if links:
        notes.append(f"captions that are links to files outside of {folder}: {some(links)}")
    return Captions(texts, refused, tuple(notes))


def find_orphans(folder: Path, videos: list[Path]) -> list[str]:
    """Lists the caption files in `folder` and below it without a video of their name, as sorted relative paths."""
    stems = {stem_of(video) for video in videos}
    lists = {path for pair in find_lists(folder).values() for path in pair}
    alone = (
        Path(path)
        for path, name in walk(folder)
        if suffix_of(name) in SIDECAR_SUFFIXES and not name.startswith(".") and stem_of(path) not in stems
    )
    orphans = sorted(path for path in alone if path not in lists and path.is_file())
    # They are printed, which fails for names that are not UTF-8.
    return [path.relative_to(folder).as_posix().encode(errors="backslashreplace").decode() for path in orphans]


def apply_rules(texts: list[str], rules: CaptionRules, name: str) -> tuple[str, ...]:
    """Applies the rules to a clip's texts; returns captions that are distinct and not empty, in order.

    Args:
        texts: of the clip's files, each on one line.
        rules: prefix, suffix and tag dropout.
        name: the clip's path in its folder, which keys the draws of tags.
    """
    captions = []
    for number, text in enumerate(filter(None, texts)):
        for variant in range(rules.variants):
            drawn = drop_tags(text, rules.tag_dropout, f"{rules.seed}\0{name}\0{number}\0{variant}")
            captions.append(_surround(drawn, rules.prefix, rules.suffix))
    return tuple(dict.fromkeys(captions))


def drop_tags(caption: str, share: float, key: str) -> str:
    """Drops each comma-separated tag except the first with the probability `share`.

    The draws are hashes of `key` and the tag's number, so they are the same on every machine and in any order.
    """
    if share == 0:
        return caption
    first, *others = [tag.strip() for tag in caption.split(",")]
    kept = [tag for number, tag in enumerate(others, start=1) if _uniform(f"{key}\0{number}") >= share]
    return ", ".join(filter(None, [first, *kept]))


def _uniform(key: str) -> float:
    """Returns a number in [0, 1) that is a function of `key`."""
    # A file name may hold bytes that are not UTF-8.
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _surround(caption: str, prefix: str, suffix: str) -> str:
    """Joins with one space, unless the texts have space there or the suffix begins with punctuation."""
    before = prefix if not prefix or prefix[-1].isspace() else f"{prefix} "
    after = suffix if not suffix or suffix[0].isspace() or suffix[0] in ",.;:!?" else f" {suffix}"
    return _one_line(before + caption + after)


def _find_sidecars(videos: list[Path]) -> dict[Path, Path]:
    """Returns the caption file of each video that has one."""
    by_stem: dict[str, list[Path]] = {}
    for parent in sorted({video.parent for video in videos}):
        for name in sorted(os.listdir(parent)):
            if suffix_of(name) in SIDECAR_SUFFIXES and (path := parent / name).is_file():
                by_stem.setdefault(stem_of(path), []).append(path)

    def rank(path: Path, video: Path) -> tuple[bool, int, bool]:
        is_other = os.path.splitext(path)[0] != os.path.splitext(video)[0]
        return is_other, SIDECAR_SUFFIXES.index(path.suffix.lower()), path.suffix != path.suffix.lower()

    found = {video: by_stem.get(stem_of(video)) for video in videos}
    return {video: min(paths, key=lambda path: rank(path, video)) for video, paths in found.items() if paths}


def _leads_out(sidecar: Path, video: Path, folder: Path) -> bool:
    """Whether a caption file is a link out of the folder, and not to the folder that the video is linked from too."""
    if not sidecar.is_symlink():
        return False
    real = sidecar.resolve()
    return not real.is_relative_to(folder.resolve()) and real.parent != video.resolve().parent


def stem_of(path: Path | str) -> str:
    """Returns a path without its suffix, with accents in NFC."""
    # macOS stores accents decomposed, other systems composed: both are the same name.
    return unicodedata.normalize("NFC", os.path.splitext(path)[0])


def _read_sidecar(path: Path, video: Path, split: Literal["one", "lines"]) -> tuple[list[str], str]:
    """Returns the captions of a text file, none empty, and its encoding."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes > _MAX_SIDECAR_BYTES:
            raise DataError(f"{path}: has {num_bytes / 2**20:.0f} MiB, too much for a caption: shorten it.")
        text, encoding = read_text(path, fallback="cp1252")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}): save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    captions = [_one_line(part) for part in (text.split("\n") if split == "lines" else [text])]
    for caption in captions:
        _check(video, str(path), caption)
    return [caption for caption in captions if caption], encoding


def _row_texts(video: Path, rows: list[TableRow]) -> list[str]:
    for row in rows:
        if row.problem:
            raise DataError(row.problem)
    captions = [(row.where, _one_line(caption)) for row in rows for caption in row.captions]
    for where, caption in captions:
        _check(video, where, caption)
    return [caption for _, caption in captions]


def _check(video: Path, where: str, caption: str) -> None:
    """Refuses a caption that T5 or the cache cannot take."""
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise DataError(
            f"{video}: has a caption of {len(caption)} characters, more than {MAX_CAPTION_CHARACTERS}; 256 tokens are "
            f"used: shorten it ({where})."
        )
    if "\0" in caption:
        raise DataError(f"{where}: contains NUL characters, so it is not text or not UTF-8: save it as UTF-8 text.")
    half = find_lone_surrogate(caption)
    if half is not None:
        raise DataError(f"{where}: contains half of a character, {half}: write the whole character.")


def _one_line(text: str) -> str:
    """Returns a text in one line; "" if it has only spaces and invisible characters, such as U+200B or U+FEFF."""
    line = " ".join(line.strip() for line in text.splitlines() if line.strip())
    is_visible = any(not letter.isspace() and unicodedata.category(letter) != "Cf" for letter in line)
    return line if is_visible else ""
