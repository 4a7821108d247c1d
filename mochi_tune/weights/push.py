"""Uploads a folder to the hub: makes the repository where there is none, and adds or replaces files by one commit."""

import shlex
from pathlib import Path

from mochi_tune.adapters.hub import TIMEOUT_SECONDS, answered_within
from mochi_tune.errors import CheckpointError, ConfigError

# The hub may take its time over what was sent. Its library asks again, some times, where no answer comes.
UPLOAD_TIMEOUT_SECONDS = 60


def check_login(key: str, repo: str) -> None:
    """Refuses an upload without a token; asks nothing of the hub.

    Args:
        key: setting that names the repository, for the text.
        repo: owner/name.

    Raises:
        ConfigError: huggingface_hub has no token.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigError(f"{key}={repo} needs a login on the hub, and there is none: run `hf auth login` first.")


def upload_command(folder: Path, repo: str, is_private: bool) -> str:
    """Returns the command by which a user uploads a folder by hand."""
    return shlex.join(["hf", "upload", repo, str(folder), *(["--private"] if is_private else [])])


def upload(folder: Path, repo: str, is_private: bool, endpoint: str | None = None) -> str:
    """Uploads every file of a folder; other files of the repository stay.

    Args:
        folder: complete.
        repo: owner/name.
        is_private: whether a repository that is made is private; an existing one stays as it is.
        endpoint: address of the hub; huggingface_hub's default where it is None.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: the hub refuses, does not answer, or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    # The base error of whichever HTTP library the installed version uses.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    api = HfApi(endpoint=endpoint, library_name="mochi-tune")
    try:
        with answered_within(TIMEOUT_SECONDS):
            url = api.create_repo(repo, private=is_private, exist_ok=True)
        with answered_within(UPLOAD_TIMEOUT_SECONDS):
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by mochi-tune")
    # A transfer that breaks off is a RuntimeError, and an answer that is not the hub's a ValueError.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise CheckpointError(
            f"{folder} is complete, and was not uploaded to {repo} ({reason}): "
            f"`{upload_command(folder, repo, is_private)}` sends it."
        ) from error
    return str(url)
