"""Finds the file of an adapter that is named by its path, its folder, or a repository of the hub."""

import re
from collections.abc import Iterable
from pathlib import Path

from mochi_tune.adapters.alphas import FASTVIDEO_CONFIG, PEFT_CONFIG
from mochi_tune.adapters.hub import TIMEOUT_SECONDS, one_line
from mochi_tune.adapters.other_bases import check_base, hub_bases
from mochi_tune.errors import CheckpointError, some

HUB = "hub:"
# What peft, diffusers and `train` call an adapter; a checkpoint with a moving average has two.
_NAMES = ("adapter_model", "pytorch_lora_weights", "adapter", "averaged")
_HUB_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([\w./-]+))?")


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
        LocalEntryNotFoundError,
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
    repo, inner, revision = match[1], match[2] or "", match[3] or "main"
    api = HfApi(endpoint=endpoint)
    try:
        info = api.model_info(repo, revision=revision, timeout=TIMEOUT_SECONDS)
        check_base(f"adapter {name}", hub_bases(info.tags))
        listed = [entry.rfilename for entry in info.siblings or []]
        file = _file_in_repo(name, inner, listed)
        folder = Path(file).parent
        configs = [(folder / config).as_posix() for config in (PEFT_CONFIG, FASTVIDEO_CONFIG)]
        # The adapter comes last: where the cache has it, it has what states its alpha, too.
        wanted = [*(config for config in configs if config in listed), file]
        paths = [api.hf_hub_download(repo, each, revision=revision) for each in wanted]
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"adapter {name}: the hub has no such repository, revision or file that you may read ({one_line(error)}): "
            "check the name, or log in with `hf auth login`."
        ) from None
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        try:
            cached = Path(api.snapshot_download(repo, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, OSError):
            raise CheckpointError(
                f"adapter {name}: the hub is not reached ({one_line(error)}) and its cache has no such repository: "
                "check the network connection, or name a file."
            ) from None
        listed = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
        return cached / _file_in_repo(name, inner, listed)
    if len({Path(path).parent for path in paths}) > 1:
        raise CheckpointError(f"adapter {name} was changed on the hub while it was fetched: run the command again.")
    return Path(paths[-1])


def _file_in_repo(name: str, inner: str, listed: list[str]) -> str:
    """Returns the adapter's path in a repository, where a file or a folder of it is named or neither."""
    if inner.endswith(".safetensors") or inner in listed:
        if inner not in listed:
            files = [file for file in listed if file.endswith(".safetensors")]
            raise CheckpointError(f"adapter {name}: there is no {inner}, there is {some(files) or 'no adapter'}.")
        return inner
    folder = Path(inner)
    return (folder / _choose(name, [Path(file).name for file in listed if Path(file).parent == folder])).as_posix()
