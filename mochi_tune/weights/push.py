"""Uploads a folder to the hub: makes the repository if needed, and adds or replaces files in one commit."""

import shlex
from pathlib import Path

from mochi_tune.adapters.hub import TIMEOUT_SECONDS, answered_within
from mochi_tune.errors import CheckpointError, ConfigError, one_line

# Seconds without an answer until a request of an upload fails; the library retries some requests.
_UPLOAD_TIMEOUT_SECONDS = 60


def check_login(key: str, repo: str) -> None:
    """Refuses an upload without a token; sends nothing to the hub.

    Args:
        key: setting that names the repository, for the message.
        repo: owner/name.

    Raises:
        ConfigError: huggingface_hub has no token.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigError(f"{key}={repo} needs a login on the hub, and there is none: run `hf auth login` first.")


def upload_command(folder: Path, repo: str, is_private: bool) -> str:
    """Returns the command line for uploading a folder manually."""
    return shlex.join(["hf", "upload", repo, str(folder), *(["--private"] if is_private else [])])


def upload(folder: Path, repo: str, is_private: bool, endpoint: str | None = None) -> str:
    """Uploads all files of a folder; other files of the repository stay.

    Args:
        folder: folder to upload.
        repo: owner/name.
        is_private: whether a new repository is private; an existing one keeps its visibility.
        endpoint: URL of the hub; None for huggingface_hub's default.

    Returns:
        The URL of the repository.

    Raises:
        CheckpointError: the hub refuses, does not answer or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    # HTTPError is the base class of the installed version's HTTP library.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    api = HfApi(endpoint=endpoint, library_name="mochi-tune")
    try:
        with answered_within(TIMEOUT_SECONDS):
            url = api.create_repo(repo, private=is_private, exist_ok=True)
        with answered_within(_UPLOAD_TIMEOUT_SECONDS):
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by mochi-tune")
    # An interrupted transfer raises RuntimeError, and an answer that is not the hub's ValueError.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = one_line(error.__cause__ or error)
        raise CheckpointError(
            f"{folder} is complete but was not uploaded to {repo} ({reason}): "
            f"`{upload_command(folder, repo, is_private)}` uploads it."
        ) from error
    return str(url)
