"""`weights pull`: downloads weights from the hub, resumes partial downloads, and checks the hash of every file.

`sources` lists the files. `pull_record` records what was pulled into a folder, which later pulls follow.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from mochi_tune.adapters.hub import TIMEOUT_SECONDS
from mochi_tune.errors import CheckpointError, format_bytes, one_line
from mochi_tune.files import lock_file
from mochi_tune.weights.download import AGAIN, CHUNK_BYTES, fetch
from mochi_tune.weights.pull_record import HubFile, Listing, Record, check_same_files, read_record, write_record
from mochi_tune.weights.sources import PRECISIONS, RepoFiles, source_files


@dataclass(frozen=True)
class PullSettings:
    """What to pull.

    Attributes:
        source: "official", "diffusers" or "comfyui".
        precision: one of `sources.PRECISIONS` of the source; None for the first.
        repo: repository on the hub with the same layout as that of the source; None for the latter.
        revision: branch, tag or commit of the repository; None for the commit that the folder has or, in a new folder,
            the one that is known to fit.
        endpoint: URL of the hub; None for huggingface_hub's default.
    """

    source: str = "official"
    precision: str | None = None
    repo: str | None = None
    revision: str | None = None
    endpoint: str | None = None


@dataclass(frozen=True)
class PullPlan:
    """The files that a pull puts into a folder.

    Attributes:
        folder: the weights folder.
        record: the files that belong into it.
        offline: reason why the hub could not be reached; "" if it was reached.
        notes: lines for the user.
    """

    folder: Path
    record: Record
    offline: str
    notes: list[str]

    @property
    def files(self) -> list[HubFile]:
        """All files that belong into the folder."""
        return [file for listing in self.record.listings for file in listing.files]

    def describe(self) -> list[str]:
        """Returns one line per file with its size and whether it exists, and a line with the totals."""
        lines = [f"{listing.repo}, commit {listing.commit}" for listing in self.record.listings]
        for file in self.files:
            state = "there" if (self.folder / file.name).exists() else "to fetch"
            lines.append(f"{format_bytes(file.num_bytes):>13}  {state:<8}  {file.name}")
        total, missing = sum(file.num_bytes for file in self.files), missing_bytes(self.folder, self.files)
        free = shutil.disk_usage(existing_parent(self.folder)).free
        lines.append(f"{format_bytes(total):>13} in all, {format_bytes(missing)} to fetch, {free / 2**30:.1f} GiB free")
        return lines


class HubUnreachableError(CheckpointError):
    """The hub did not answer, or the answer was not the hub's.

    Attributes:
        reason: short reason.
    """

    def __init__(self, repo: str, reason: str, advice: str) -> None:
        super().__init__(f"repo={repo} cannot be listed ({reason}): {advice} and {AGAIN}")
        self.reason = reason


def main(to: Path, settings: PullSettings) -> list[str]:
    """Downloads weights to a folder and checks their hashes; a second run only checks them again.

    Args:
        to: weights folder; made if it does not exist.
        settings: what to pull.

    Returns:
        Lines for the user.

    Raises:
        ConfigError: the source or the precision is unknown, or `to` holds another one.
        CheckpointError: the hub cannot be reached or lacks a file, the disk is too small, or a hash is wrong. A new
            file with a wrong hash is removed; one that existed before stays.
    """
    plan = plan_pull(to, settings)
    if plan.offline:
        check_offline(plan)
        return [*plan.notes, f"offline ({plan.offline}): all {len(plan.files)} files are as they were pulled"]
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"to={to}: the folder cannot be made ({error}): set another one.") from error
    with only_process(to):
        fill_folder(to, plan)
    return plan.notes


@contextlib.contextmanager
def only_process(to: Path) -> Iterator[None]:
    """Refuses a second pull into a folder at the same time, because both would append to the same files.

    Raises:
        CheckpointError: another process is pulling into the folder.
    """
    path = to / ".pull.lock"
    with open(path, "a") as file:
        try:
            # On a disk without locks, no process is refused.
            lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder removes the file in the end, so another process may have locked a new one with this name.
            is_ours = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            raise CheckpointError(
                f"another `weights pull` into {to} is running: wait until it ends, then run this command again, which "
                "checks the files."
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def fill_folder(to: Path, plan: PullPlan) -> None:
    """Downloads missing files and checks existing ones.

    Raises:
        CheckpointError: as `main`.
    """
    check_space(to, plan.files)
    # Before the files, so that an interrupted pull continues with the same commit.
    write_record(to, plan.record)
    for file in plan.files:
        target = to / file.name
        if target.exists():
            check_present(target, file)
            continue
        partial = partial_path(to, file)
        partial.parent.mkdir(exist_ok=True)
        fetch(file, partial)
        found = file_digest(partial, file)
        if found != file.digest:
            partial.unlink()
            raise CheckpointError(
                f"{file.name} arrived with hash {found}, not {file.digest}, and was removed: run the command again."
            )
        partial.replace(target)


def plan_pull(to: Path, settings: PullSettings) -> PullPlan:
    """Lists the files of a pull, from the hub or, if it cannot be reached, from pulled.json in the folder.

    Raises:
        ConfigError: the source or the precision is unknown, or the folder holds another one.
        CheckpointError: neither the hub nor a record has the list, or the folder holds other files with these names.
    """
    parts = source_files(settings.source, settings.precision, settings.repo, settings.revision)
    precision = settings.precision or PRECISIONS[settings.source][0]
    kept = read_record(to)
    notes = []
    if kept is not None:
        kept.check_fits(to, settings.source, precision, [part.repo for part in parts])
        if settings.revision is None:
            if kept.listings[0].commit != parts[0].revision != "main":
                notes.append(
                    f"{to} stays at commit {kept.listings[0].commit} of its first pull; the default of this version is "
                    f"revision={parts[0].revision}"
                )
            parts[0] = kept.pinned(parts[0])
        parts[1:] = [kept.pinned(part) for part in parts[1:]]
    try:
        listings = [list_files(part, settings.endpoint) for part in parts]
    except HubUnreachableError as error:
        if kept is None or settings.revision not in (None, kept.revision, kept.listings[0].commit):
            raise
        return PullPlan(to, kept, error.reason, notes)
    revision = settings.revision or (kept.revision if kept is not None else parts[0].revision)
    record = Record(settings.source, precision, revision, listings)
    if kept is not None:
        check_same_files(to, kept, record)
    return PullPlan(to, record, "", notes)


def list_files(part: RepoFiles, endpoint: str | None) -> Listing:
    """Gets the sizes and hashes of the files from the hub, at the current commit of the revision.

    Raises:
        HubUnreachableError: there is no connection, HF_HUB_OFFLINE is set, or the answer is not the hub's.
        CheckpointError: there is no such repository or revision, or it lacks a file.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.constants import is_offline_mode

    # HTTPError is the base class of the installed version's HTTP library.
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, revision = part.repo, part.revision
    if is_offline_mode():
        raise HubUnreachableError(repo, "HF_HUB_OFFLINE is set", "unset it for the first pull")
    try:
        info = HfApi(endpoint=endpoint).model_info(
            repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS
        )
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no repo={repo} that you may read: check its name, or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"repo={repo} has no revision={revision}: use main, a tag or a commit.") from error
    except HFValidationError as error:
        raise CheckpointError(f"repo={repo} cannot be listed ({one_line(error)}): name it OWNER/NAME.") from error
    except (HTTPError, OSError) as error:
        is_refused = getattr(getattr(error, "response", None), "status_code", 0) in (401, 403)
        advice = "log in with `hf auth login`, or check the proxy" if is_refused else "check the network connection"
        raise HubUnreachableError(repo, one_line(error), advice) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "the answer is not the hub's, but what a login page or a proxy may send"
        raise HubUnreachableError(repo, reason, "log in to the network, or check the proxy") from error
    chosen = part.choose([entry.rfilename for entry in info.siblings or []])
    absent = [name for name in part.needed if not any(fnmatch(target, name) for target in chosen)]
    if absent:
        raise CheckpointError(
            f"repo={repo} has no {', '.join(absent)}: use one with the layout of the source's own repository."
        )
    entries = {entry.rfilename: entry for entry in info.siblings or []}
    files = []
    for target, name in chosen.items():
        entry = entries[name]
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
        if (
            type(entry.size) is not int
            or entry.size < 0
            or not re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", f"{digest}")
        ):
            raise CheckpointError(f"the hub states no size and hash of {repo}'s {name}: use another endpoint.")
        url = hf_hub_url(repo, name, revision=info.sha, endpoint=endpoint)
        files.append(HubFile(target, url, entry.size, str(digest)))
    return Listing(repo, str(info.sha), files)


def check_offline(plan: PullPlan) -> None:
    """Compares the files of a folder with its record, without the hub.

    Raises:
        CheckpointError: a file is missing or differs.
    """
    absent = [file.name for file in plan.files if not (plan.folder / file.name).exists()]
    if absent:
        raise CheckpointError(
            f"{plan.folder} lacks {', '.join(absent)}, and the hub cannot be asked ({plan.offline}): {AGAIN}"
        )
    for file in plan.files:
        check_present(plan.folder / file.name, file)


def check_present(target: Path, file: HubFile) -> None:
    """Refuses an existing file that is not the one on the hub.

    Raises:
        CheckpointError: the size or the hash differs.
    """
    if target.stat().st_size != file.num_bytes or file_digest(target, file) != file.digest:
        raise CheckpointError(
            f"{target} is not the file on the hub, whose hash is {file.digest}: move or delete it, and run again."
        )


def check_space(to: Path, files: list[HubFile]) -> None:
    """Refuses a download that does not fit on the disk.

    Raises:
        CheckpointError: the free space is less than what is left to download.
    """
    needed, free = missing_bytes(to, files), shutil.disk_usage(to).free
    if needed > free:
        raise CheckpointError(
            f"{to} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} GiB are left to download: "
            "free some space, or set to=DIR on another disk."
        )


def missing_bytes(to: Path, files: list[HubFile]) -> int:
    """Returns the number of bytes that are left to download."""
    missing = 0
    for file in files:
        partial = partial_path(to, file)
        have = partial.stat().st_size if partial.exists() else 0
        missing += 0 if (to / file.name).exists() else max(0, file.num_bytes - have)
    return missing


def existing_parent(folder: Path) -> Path:
    """Returns a folder, or its nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def partial_path(to: Path, file: HubFile) -> Path:
    """Returns the path of a partial download; its name has the hash, so that another revision does not continue it."""
    target = to / file.name
    return target.with_name(f".{target.name}.{file.digest[:12]}.part")


def file_digest(path: Path, file: HubFile) -> str:
    """Hashes a file on disk as the hub hashes `file`: with sha256, or with git's sha1 of a blob."""
    size = path.stat().st_size
    digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(f"blob {size}\0".encode())
    with path.open("rb") as source, tqdm(desc=f"checking {file.name}", total=size, unit="B", unit_scale=True) as bar:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
