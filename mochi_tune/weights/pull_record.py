"""Reads and writes pulled.json, which records the commit of a weights folder, and the size and hash of each file.

It pins the folder to that commit. A pull without a network compares the files with it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mochi_tune.errors import CheckpointError, ConfigError, some
from mochi_tune.files import read_json, write_atomic
from mochi_tune.weights.sources import RepoFiles

RECORD = "pulled.json"
_HASHES = {64: "sha256", 40: "git_blob"}


@dataclass(frozen=True)
class HubFile:
    """A file to download, with its description by the hub."""

    name: str  # in the weights folder
    url: str
    num_bytes: int
    digest: str  # sha256 of a large (LFS) file; of a small one git's blob id, a sha1


@dataclass(frozen=True)
class Listing:
    """The files of a weights folder from one repository at one commit."""

    repo: str
    commit: str
    files: list[HubFile]


@dataclass(frozen=True)
class Record:
    """The files of a weights folder, and where they come from.

    Attributes:
        source: a key of `sources.PRECISIONS`.
        precision: precision of that source.
        revision: requested revision of the first repository.
        listings: files of each repository.
    """

    source: str
    precision: str
    revision: str
    listings: list[Listing]

    def check_fits(self, folder: Path, source: str, precision: str, repos: Sequence[str]) -> None:
        """Refuses to mix sources in one folder, of which only the first layout would be loaded.

        Raises:
            ConfigError: the folder holds another source, precision or repository.
        """
        held = [f"source={self.source}", f"precision={self.precision}", *(each.repo for each in self.listings)]
        asked = [f"source={source}", f"precision={precision}", *repos]
        if held != asked:
            raise ConfigError(
                f"{folder} holds {' '.join(held)} by its {RECORD}, and the pull asks for {' '.join(asked)}: "
                "set to=DIR to another folder."
            )

    def pinned(self, part: RepoFiles) -> RepoFiles:
        """Returns the files of a repository, pinned to the commit of the folder."""
        return replace(part, revision=next(each.commit for each in self.listings if each.repo == part.repo))


def write_record(folder: Path, record: Record) -> None:
    """Writes pulled.json to a weights folder, atomically."""
    repositories = [
        {
            "repo": listing.repo,
            "commit": listing.commit,
            "files": {
                file.name: {"bytes": file.num_bytes, _HASHES[len(file.digest)]: file.digest} for file in listing.files
            },
        }
        for listing in record.listings
    ]
    value = {
        "source": record.source, "precision": record.precision, "revision": record.revision,
        "repositories": repositories,
    }  # fmt: skip
    write_atomic(folder / RECORD, (json.dumps(value, indent=1) + "\n").encode(), durable=True)


def read_record(folder: Path) -> Record | None:
    """Reads pulled.json of a weights folder; returns None if there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    value = read_json(path)
    try:
        listings = [
            Listing(each["repo"], each["commit"], [_read_file(name, file) for name, file in each["files"].items()])
            for each in value["repositories"]
        ]
        record = Record(value["source"], value["precision"], value["revision"], listings)
        texts = (record.source, record.precision, record.revision, *(t for e in listings for t in (e.repo, e.commit)))
        if not listings or not all(isinstance(text, str) for text in texts):
            raise ValueError("a value that should be text is not")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete it, and run `weights pull` again.") from error
    return record


def _read_file(name: str, file: dict) -> HubFile:
    digest = file.get("sha256") or file["git_blob"]
    if not re.fullmatch(r"(\w[\w.-]*/)*\w[\w.-]*", name) or not re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", digest):
        raise ValueError(f"{name!a} is not the name and hash of a file of the folder")
    return HubFile(name, "", int(file["bytes"]), digest)


def check_same_files(folder: Path, kept: Record, now: Record) -> None:
    """Refuses a commit in which files of the folder differ.

    Raises:
        CheckpointError: a file differs.
    """
    for before, after in zip(kept.listings, now.listings, strict=True):
        digests = {file.name: file.digest for file in after.files}
        others = [f.name for f in before.files if digests.get(f.name) != f.digest and (folder / f.name).exists()]
        if others:
            raise CheckpointError(
                f"{folder} holds commit {before.commit} of {before.repo}, and revision={now.revision} is commit "
                f"{after.commit}, in which {some(others)} differ: set to=DIR to another folder for it, or "
                f"revision={before.commit}."
            )
