"""`weights pull`: fetches the official weights from the hub, going on where it stopped, and checks every file."""

import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mochi_tune.errors import CheckpointError
from mochi_tune.files import fsync

REPO = "genmo/mochi-1-preview"
REQUIRED = (
    "dit.safetensors",
    "encoder.safetensors",
    "decoder.safetensors",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
)
# The repository also holds diffusers' copy of the models and bf16 variants of T5, which would double the download.
WANTED = re.compile(
    r"(dit|encoder|decoder)\.safetensors|(dit|vae)_config\.json"
    r"|text_encoder/(config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json)"
    r"|tokenizer/[\w-]+\.(json|model)"
)
CHUNK_BYTES = 2**20
TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class HubFile:
    """One file to fetch, and what the hub says of it."""

    name: str
    url: str
    num_bytes: int
    digest: str  # sha256 of a large (LFS) file; of a small one git's blob id, a sha1


def main(to: Path, repo: str = REPO, revision: str = "main", endpoint: str | None = None) -> None:
    """Fills the folder `to` with verified weights; a second run fetches nothing and checks them again.

    Args:
        to: the weights folder, made where it is missing.
        repo: of the hub, laid out as genmo/mochi-1-preview is.
        revision: a branch, a tag or a commit.
        endpoint: address of the hub; huggingface_hub's default where it is None.

    Raises:
        CheckpointError: the hub cannot be reached or lacks a file, the disk is too small, or a file's hash is wrong;
            a file that has just arrived is removed then, one that was there before is left.
    """
    files = list_files(repo, revision, endpoint)
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"to={to} cannot be made a folder ({error}): set another one.") from error
    check_space(to, files)
    for file in files:
        target = to / file.name
        if target.exists():
            if file_digest(target, file) != file.digest:
                raise CheckpointError(
                    f"{target} is not the file of repo={repo}, whose hash is {file.digest}: "
                    "move or delete it, and run again."
                )
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


def list_files(repo: str, revision: str, endpoint: str | None) -> list[HubFile]:
    """Asks the hub for the wanted files' sizes and hashes, at the commit that `revision` stands for now.

    Raises:
        CheckpointError: no such repository or revision, no connection, or a required file is not there.
    """
    from huggingface_hub import HfApi, hf_hub_url

    # The base error of whichever HTTP library the installed version uses.
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

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
    except (HTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"repo={repo} cannot be listed ({one_line(error)}): check the network connection and run the same command "
            "again, it goes on from what is there."
        ) from error
    files = []
    for entry in info.siblings or []:
        if WANTED.fullmatch(entry.rfilename):
            url = hf_hub_url(repo, entry.rfilename, revision=info.sha, endpoint=endpoint)
            digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
            assert entry.size is not None and digest is not None, "files_metadata=True asks for both"
            files.append(HubFile(entry.rfilename, url, entry.size, digest))
    absent = [name for name in REQUIRED if name not in {file.name for file in files}]
    if absent:
        raise CheckpointError(f"repo={repo} has no {', '.join(absent)}: use one laid out as {REPO} is.")
    return files


def check_space(to: Path, files: list[HubFile]) -> None:
    """Refuses a download that the disk cannot hold.

    Raises:
        CheckpointError: the free space is below what is still to be fetched.
    """
    needed = 0
    for file in files:
        partial = partial_path(to, file)
        have = partial.stat().st_size if partial.exists() else 0
        needed += 0 if (to / file.name).exists() else file.num_bytes - have
    free = shutil.disk_usage(to).free
    if needed > free:
        raise CheckpointError(
            f"{to} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} GiB are to be fetched: "
            "free some space, or set to=DIR on another disk."
        )


def partial_path(to: Path, file: HubFile) -> Path:
    """Names the unfinished file after its hash, so that another revision never goes on with it."""
    target = to / file.name
    return target.with_name(f".{target.name}.{file.digest[:12]}.part")


def fetch(file: HubFile, partial: Path) -> None:
    """Appends to `partial` until it is complete; a broken connection is taken up again while bytes keep coming.

    Raises:
        CheckpointError: a connection brought nothing. What was fetched stays.
    """
    with partial.open("ab") as out, tqdm(desc=file.name, total=file.num_bytes, unit="B", unit_scale=True) as bar:
        while (start := out.seek(0, os.SEEK_END)) < file.num_bytes:
            reason = "the connection was closed"
            try:
                download(file, start, out, bar)
            except (OSError, http.client.HTTPException) as error:
                reason = one_line(error)
            if out.tell() <= start:
                raise CheckpointError(
                    f"{file.name} stopped at {start} of {file.num_bytes} bytes ({reason}): check the network "
                    "connection and run the same command again, it goes on from there."
                )
    fsync(partial)


def download(file: HubFile, start: int, out, bar: tqdm) -> None:
    """Asks for the bytes from `start` on, and appends what one connection brings."""
    from huggingface_hub.utils import build_hf_headers

    request = urllib.request.Request(file.url, headers={"Range": f"bytes={start}-", "Accept-Encoding": "identity"})
    for name, value in build_hf_headers(library_name="mochi-tune").items():
        request.add_unredirected_header(name, value)
    opener = urllib.request.build_opener(SameHostHeaders)
    with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            # The server ignores ranges, so this is the whole file.
            out.truncate(0)
            start = out.seek(0)
        bar.update(start - bar.n)
        while chunk := response.read(CHUNK_BYTES):
            out.write(chunk)
            bar.update(len(chunk))


class SameHostHeaders(urllib.request.HTTPRedirectHandler):
    """Keeps the user's token for the hub itself: a redirect to the storage host goes without it."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """Hands the unredirected headers on where the host stays the same."""
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and new.host == req.host:
            for name, value in req.unredirected_hdrs.items():
                new.add_unredirected_header(name, value)
        return new


def file_digest(path: Path, file: HubFile) -> str:
    """Hashes a file on disk as the hub hashed this one: sha256, or git's sha1 of a blob where that is given."""
    size = path.stat().st_size
    digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(f"blob {size}\0".encode())
    with path.open("rb") as source, tqdm(desc=f"checking {file.name}", total=size, unit="B", unit_scale=True) as bar:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """Returns an error's text without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
