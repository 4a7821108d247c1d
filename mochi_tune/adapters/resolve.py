"""Finds the file of an adapter from a path, a folder or a repository on the hub."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mochi_tune.adapters.alphas import FASTVIDEO_CONFIG, PEFT_CONFIG
from mochi_tune.adapters.hub import TIMEOUT_SECONDS, answered_within
from mochi_tune.adapters.notes import notify
from mochi_tune.adapters.other_bases import check_base, hub_bases
from mochi_tune.errors import CheckpointError, one_line, some

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUB = "hub:"
# File names of adapters by peft, diffusers and `train`; a checkpoint with an EMA has two of them.
_NAMES = ("adapter_model", "pytorch_lora_weights", "adapter", "averaged")
# Suffixes of pickles.
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
# A file of an adapter that is split into several ones, or their index.
_PART = re.compile(r"-\d{5}-of-(?!00001)(\d{5})\.safetensors$|\.safetensors\.index\.json$")
_HUB_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([\w./-]+))?")
# HTTP statuses that are temporary: proxy login, timeout, rate limit.
_TEMPORARY = (407, 408, 429)


class _Wanted(NamedTuple):
    """An adapter on the hub: full name, repository, file or folder in it, and revision."""

    name: str
    repo: str
    inner: str
    revision: str


def find_adapter_file(name: Path | str, endpoint: str | None = None) -> Path:
    """Returns the file of an adapter, and downloads it if it is on the hub.

    Args:
        name: a file; a folder, in which the adapter has a usual name or is the only .safetensors file; or
            hub:OWNER/NAME[/FILE or FOLDER][@REVISION]. An adapter on the hub is downloaded to the hub's cache with the
            configs next to it. If the hub cannot be reached, the cached file is used.
        endpoint: URL of the hub; None for huggingface_hub's default.

    Raises:
        CheckpointError: a folder has no adapter or several, the adapter is split into several files, or the hub lacks
            the file, cannot be reached, or states that the adapter is one of another model.
    """
    if str(name).startswith(HUB):
        return _fetch(str(name), endpoint)
    path = Path(name)
    if not path.is_dir():
        _check_whole(f"adapter {path}", path.name)
        return path
    return path / _choose(f"the folder {path}", [file.name for file in path.iterdir() if file.is_file()])


def _choose(where: str, files: Iterable[str]) -> str:
    """Returns the name of the adapter among the file names of a folder."""
    files = sorted(files)
    candidates = [file for file in files if file.lower().endswith(".safetensors")]
    usual = [file for file in candidates if file.removesuffix(".safetensors") in _NAMES]
    chosen = usual or candidates
    for file in chosen:
        _check_whole(f"{where} has {file}, which", file)
    if len(chosen) == 1:
        return chosen[0]
    if not chosen and (pickles := [file for file in files if Path(file).suffix.lower() in PICKLES]):
        raise CheckpointError(
            f"{where} has no .safetensors file but {some(pickles)}, and pickles can run code, so they are never opened:"
            " convert the adapter to safetensors first."
        )
    if not chosen:
        raise CheckpointError(f"{where} has no .safetensors file: name one that holds an adapter.")
    if not usual:
        raise CheckpointError(f"{where} has several .safetensors files, {some(chosen)}: name the one of the adapter.")
    raise CheckpointError(f"{where} has several adapters, {some(chosen)}: name the file.")


def _check_whole(where: str, file: str) -> None:
    """Refuses a part of an adapter, without whose other parts it would apply only some of the layers."""
    if match := _PART.search(file):
        kind = f"one of {int(match[1])} parts of an adapter" if match[1] else "the index of an adapter in parts"
        raise CheckpointError(f"{where} is {kind}: join the parts into one .safetensors file, see docs/adapters.md.")


def _fetch(name: str, endpoint: str | None) -> Path:
    """Returns the cached file of an adapter on the hub, and downloads it if needed."""
    from huggingface_hub import HfApi

    # HTTPError is the base class of the installed version's HTTP library.
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"adapter {name} is not a name on the hub: use hub:OWNER/NAME, with /FILE and @REVISION as needed."
        )
    wanted = _Wanted(name, match[1], match[2] or "", match[3] or "main")
    api = HfApi(endpoint=endpoint)
    try:
        with answered_within(TIMEOUT_SECONDS):
            return _from_hub(api, wanted)
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"adapter {name}: the hub has no such repository, revision or file that you may read ({one_line(error)}): "
            "check the name, or log in with `hf auth login`."
        ) from None
    except OfflineModeIsEnabled:
        return _from_cache(api, wanted, "HF_HUB_OFFLINE is set")
    except (HTTPError, OSError) as error:
        status = next((code for each in (error, error.__cause__) if (code := _status(each))), 0)
        if 400 <= status < 500 and status not in _TEMPORARY:
            raise CheckpointError(
                f"adapter {name}: the hub refuses it ({one_line(error)}): check the name and the proxy, or log in with "
                "`hf auth login`."
            ) from None
        return _from_cache(api, wanted, one_line(error))
    except (ValueError, KeyError, TypeError, AttributeError):
        return _from_cache(api, wanted, "the answer is not the hub's, but what a login page or a proxy may send")


def _from_hub(api: "HfApi", wanted: _Wanted) -> Path:
    info = api.model_info(wanted.repo, revision=wanted.revision, timeout=TIMEOUT_SECONDS)
    check_base(f"adapter {wanted.name}", hub_bases(info.tags))
    listed = [entry.rfilename for entry in info.siblings or []]
    file = _file_in_repo(f"adapter {wanted.name}", wanted.inner, listed)
    # The adapter comes last, so that a cache with the adapter also has the configs that state its alpha.
    names = [*(config for config in _configs(file) if config in listed), file]
    paths = [Path(api.hf_hub_download(wanted.repo, name, revision=wanted.revision)) for name in names]
    if len({path.parent for path in paths}) > 1:
        raise CheckpointError(
            f"adapter {wanted.name} was changed on the hub while it was fetched: run the command again."
        )
    commit = paths[-1].parents[len(Path(file).parts) - 1].name
    # If the hub fails after its first answer, its library silently uses the cached files.
    if info.sha and commit != info.sha:
        notify(
            f"adapter {wanted.name}: the hub has the commit {info.sha[:12]} but does not send its files now: the "
            f"cached commit {commit[:12]} is used"
        )
    return paths[-1]


def _from_cache(api: "HfApi", wanted: _Wanted, reason: str) -> Path:
    """Returns the cached file of an adapter with a notice that the hub cannot be reached."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    why = f"adapter {wanted.name}: the hub cannot be reached ({reason})"
    try:
        cached = Path(api.snapshot_download(wanted.repo, revision=wanted.revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        raise CheckpointError(
            f"{why}, and its cache has no such repository: check the network connection, or name a file."
        ) from None
    listed = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
    file = _file_in_repo(f"{why}, and its cache", wanted.inner, listed)
    # Another program may have cached the adapter without the configs that are on the hub.
    lacks = not any(config in listed for config in _configs(file))
    if lacks or wanted.revision != cached.name:
        unknown = f" without {PEFT_CONFIG}, which would state its alpha if the hub has one"
        notify(f"{why}: the cached commit {cached.name[:12]} is used{unknown if lacks else ''}")
    return cached / file


def _configs(file: str) -> list[str]:
    """Returns the paths in a repository of possible configs next to a file."""
    return [(Path(file).parent / config).as_posix() for config in (PEFT_CONFIG, FASTVIDEO_CONFIG)]


def _status(error: BaseException | None) -> int:
    """Returns the HTTP status of an error, or 0 if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _file_in_repo(where: str, inner: str, listed: list[str]) -> str:
    """Returns the path of the adapter in a repository.

    Args:
        where: the repository or the cache, for messages.
        inner: file or folder in the repository, or "".
        listed: paths of all files in the repository.
    """
    if inner.endswith(".safetensors") or inner in listed:
        if inner not in listed:
            files = [file for file in listed if file.endswith(".safetensors")]
            raise CheckpointError(
                f"{where} has no {inner}, it has {some(files) or 'no adapter'}: name one that it has."
            )
        _check_whole(f"{where} has {inner}, which", inner)
        return inner
    folder = Path(inner)
    return (folder / _choose(where, [Path(file).name for file in listed if Path(file).parent == folder])).as_posix()
