"""pulled.json in a weights folder: which commit of which repository it holds, with the size and hash of each file.

It pins the folder to that commit, and is what a pull without a network compares the files with.
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
    """One file to fetch, and what the hub says of it."""

    name: str  # in the weights folder
    url: str
    num_bytes: int
    digest: str  # sha256 of a large (LFS) file; of a small one git's blob id, a sha1


@dataclass(frozen=True)
class Listing:
    """The files of one repository at one commit that belong into a weights folder."""

    repo: str
    commit: str
    files: list[HubFile]


@dataclass(frozen=True)
class Record:
    """What belongs into a weights folder.

    Attributes:
        source: a key of `sources.PRECISIONS`.
        precision: of that source.
        revision: of the first repository, as it was asked for.
        listings: of each repository.
    """

    source: str
    precision: str
    revision: str
    listings: list[Listing]

    def check_fits(self, folder: Path, source: str, precision: str, repos: Sequence[str]) -> None:
        """Refuses to mix sources in one folder, where the first layout that is found would be loaded.

        Raises:
            ConfigError: the folder holds another source, precision or repository.
        """
        held = [f"source={self.source}", f"precision={self.precision}", *(each.repo for each in self.listings)]
        asked = [f"source={source}", f"precision={precision}", *repos]
        if held != asked:
            raise ConfigError(
                f"{folder} holds {' '.join(held)}, by its {RECORD}, and {' '.join(asked)} is asked for: "
                "set to=DIR to another folder."
            )

    def pinned(self, part: RepoFiles) -> RepoFiles:
        """Returns what to list of a repository, at the commit that the folder holds."""
        return replace(part, revision=next(each.commit for each in self.listings if each.repo == part.repo))


def write_record(folder: Path, record: Record) -> None:
    """Writes pulled.json into a weights folder, whole or not at all."""
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
    """Reads pulled.json of a weights folder; None where there is none.

    Raises:
        CheckpointError: it is damaged.
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
            raise ValueError("what should be text is not")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete it, and run `weights pull` again.") from error
    return record


def _read_file(name: str, file: dict) -> HubFile:
    digest = file.get("sha256") or file["git_blob"]
    if not re.fullmatch(r"(\w[\w.-]*/)*\w[\w.-]*", name) or not re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", digest):
        raise ValueError(f"{name!a} is not the name and hash of a file of the folder")
    return HubFile(name, "", int(file["bytes"]), digest)


def check_same_files(folder: Path, kept: Record, now: Record) -> None:
    """Refuses to take a folder to another commit under its files; one that has the same files is no other one.

    Raises:
        CheckpointError: naming the commits and files.
    """
    for before, after in zip(kept.listings, now.listings, strict=True):
        digests = {file.name: file.digest for file in after.files}
        others = [f.name for f in before.files if digests.get(f.name) != f.digest and (folder / f.name).exists()]
        if others:
            raise CheckpointError(
                f"{folder} holds commit {before.commit} of {before.repo}, and revision={now.revision} is commit "
                f"{after.commit}, in which {some(others)} are others: set to=DIR to another "
                f"folder for it, or revision={before.commit}."
            )
