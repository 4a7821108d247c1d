"""Finds the file of an adapter that is named by its path, its folder, or a repository of the hub."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mochi_tune.adapters.alphas import FASTVIDEO_CONFIG, PEFT_CONFIG
from mochi_tune.adapters.hub import TIMEOUT_SECONDS, answered_within
from mochi_tune.adapters.notes import tell
from mochi_tune.adapters.other_bases import check_base, hub_bases
from mochi_tune.errors import CheckpointError, one_line, some

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUB = "hub:"
# What peft, diffusers and `train` call an adapter; a checkpoint with a moving average has two.
_NAMES = ("adapter_model", "pytorch_lora_weights", "adapter", "averaged")
_HUB_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([\w./-]+))?")
# Of the answers that refuse, those that a later or another try may not get: of a proxy, of slowness, of a limit.
_PASSING = (407, 408, 429)


class _Wanted(NamedTuple):
    """An adapter of the hub: its whole name, repository, file or folder in it, and revision."""

    name: str
    repo: str
    inner: str
    revision: str


def find_adapter_file(name: Path | str, endpoint: str | None = None) -> Path:
    """Returns the file that an adapter's name stands for.

    Args:
        name: a file; a folder, in which it has a usual name or is the only .safetensors; or
            hub:OWNER/NAME[/FILE or FOLDER][@REVISION], which is fetched into the hub's cache, with the configs beside
            it and nothing else. Where the hub is not reached, what the cache has is taken.
        endpoint: address of the hub; huggingface_hub's default where it is None.

    Raises:
        CheckpointError: a folder has no adapter or several, or the hub has no such file or is not reached, or says that
            the file is another model's.
    """
    if str(name).startswith(HUB):
        return _fetch(str(name), endpoint)
    path = Path(name)
    if not path.is_dir():
        return path
    return path / _choose(f"the folder {path}", [file.name for file in path.iterdir() if file.is_file()])


def _choose(where: str, files: Iterable[str]) -> str:
    """Returns the adapter among the names of a folder's files."""
    candidates = sorted(file for file in files if file.lower().endswith(".safetensors"))
    usual = [file for file in candidates if file.removesuffix(".safetensors") in _NAMES]
    chosen = usual or candidates
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        raise CheckpointError(f"{where} has no .safetensors file: name one that holds an adapter.")
    raise CheckpointError(f"{where} has several adapters, {some(chosen)}: name the file.")


def _fetch(name: str, endpoint: str | None) -> Path:
    """Returns an adapter of the hub in its cache, fetched where it is not there."""
    from huggingface_hub import HfApi

    # The base error of whichever HTTP library the installed version uses.
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
            f"adapter {name} is no name of the hub: write hub:OWNER/NAME, /FILE and @REVISION as needed."
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
        if 400 <= status < 500 and status not in _PASSING:
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
    # The adapter comes last: where the cache has it, it has what states its alpha, too.
    names = [*(config for config in _configs(file) if config in listed), file]
    paths = [Path(api.hf_hub_download(wanted.repo, name, revision=wanted.revision)) for name in names]
    if len({path.parent for path in paths}) > 1:
        raise CheckpointError(
            f"adapter {wanted.name} was changed on the hub while it was fetched: run the command again."
        )
    commit = paths[-1].parents[len(Path(file).parts) - 1].name
    # Where the hub fails after its first answer, its library takes what is cached, in silence.
    if info.sha and commit != info.sha:
        tell(
            f"adapter {wanted.name}: the hub has the commit {info.sha[:12]}, and does not give its files now: the "
            f"cached commit {commit[:12]} is used"
        )
    return paths[-1]


def _from_cache(api: "HfApi", wanted: _Wanted, reason: str) -> Path:
    """Returns an adapter of the cache where the hub is not reached, and says so."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    why = f"adapter {wanted.name}: the hub is not reached ({reason})"
    try:
        cached = Path(api.snapshot_download(wanted.repo, revision=wanted.revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        raise CheckpointError(
            f"{why}, and its cache has no such repository: check the network connection, or name a file."
        ) from None
    listed = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
    file = _file_in_repo(f"{why}, and its cache", wanted.inner, listed)
    # What another program has put into the cache may lack the configs that are on the hub.
    lacks = not any(config in listed for config in _configs(file))
    if lacks or wanted.revision != cached.name:
        unknown = f" without {PEFT_CONFIG}, and whether the hub has one, which states its alpha, is not known"
        tell(f"{why}: the cached commit {cached.name[:12]} is used{unknown if lacks else ''}")
    return cached / file


def _configs(file: str) -> list[str]:
    """Returns the names in a repository that configs beside a file would have."""
    return [(Path(file).parent / config).as_posix() for config in (PEFT_CONFIG, FASTVIDEO_CONFIG)]


def _status(error: BaseException | None) -> int:
    """Returns the HTTP status of an answer, 0 where there was none."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _file_in_repo(where: str, inner: str, listed: list[str]) -> str:
    """Returns the adapter's path in a repository, where a file or a folder of it is named or neither.

    Args:
        where: the repository or the cache, for messages.
        inner: the file or the folder, or "".
        listed: the repository's files.
    """
    if inner.endswith(".safetensors") or inner in listed:
        if inner not in listed:
            files = [file for file in listed if file.endswith(".safetensors")]
            raise CheckpointError(
                f"{where} has no {inner}, it has {some(files) or 'no adapter'}: name one that it has."
            )
        return inner
    folder = Path(inner)
    return (folder / _choose(where, [Path(file).name for file in listed if Path(file).parent == folder])).as_posix()
