"""The verb `describe`: captions for clips that have none."""

import os
from typing import TYPE_CHECKING

from mochi_tune.cli.options import DESCRIBE_OPTIONS, plain_options
from mochi_tune.cli.values import positive_number, true_or_false, user_path, whole_number
from mochi_tune.errors import ConfigError

if TYPE_CHECKING:
    from mochi_tune.data_prep.answers import CaptionLength
    from mochi_tune.data_prep.captioning import Wording
    from mochi_tune.data_prep.chat import Captioner
    from mochi_tune.data_prep.describe_tally import Prices

LOCAL = "local"
# The endpoint of OPENAI_API_KEY, unless OPENAI_BASE_URL names another one; the openai package reads both variables.
OPENAI_URL = "https://api.openai.com/v1"
# Maximum size of a prompt template; a larger file is not one.
MAX_TEMPLATE_BYTES = 100_000


def run_describe(arguments: list[str]) -> int:
    """Writes captions, or with dry_run says what it would do; returns 1 if clips are left without a caption."""
    options = plain_options("describe", arguments, DESCRIBE_OPTIONS)
    if options is None:
        return 0
    from mochi_tune.data_prep.captioning import Pace, RetryLimits, Writer
    from mochi_tune.data_prep.describe import LOG_NAME, Sampling, describe, find_clips, plan
    from mochi_tune.files import remove_left_behind

    is_local = options["endpoint"] == LOCAL
    wording, prices = _wording(options), _prices(options)
    sampling = Sampling(*(whole_number(key, options[key], 1) for key in ("num_frames", "image_size")))
    workers = whole_number("workers", options["workers"], 1)
    per_minute = _number_or_zero(options, "requests_per_minute")
    seconds = [positive_number(key, options[key]) for key in ("timeout_seconds", "clip_seconds", "backoff_seconds")]
    limits = RetryLimits(whole_number("retries", options["retries"], 0), *seconds)
    is_dry, with_stills = (true_or_false(key, options[key]) for key in ("dry_run", "stills"))
    if options["frames_out"] and not is_dry:
        raise ConfigError(f"frames_out={options['frames_out']} goes with dry_run=true: add it, or leave this out.")
    folder = user_path(options["videos"])
    clips = find_clips(folder, with_stills)
    for note in clips.notes:
        print(note, flush=True)
    if is_dry:
        frames_out = user_path(options["frames_out"]) if options["frames_out"] else None
        print(*plan(clips, wording, sampling, frames_out), sep="\n")
        return 0
    if not clips.without:
        for each in clips.folders:
            # Left from a process that was killed while it wrote the last caption.
            remove_left_behind(each)
        print(f"{folder}: no clip to describe, with a caption: {clips.num_with}")
        for reason in clips.refused.values():
            print(f"no caption: {reason}")
        return 1 if clips.refused else 0
    captioner = _captioner(options, is_local)
    try:
        for note in captioner.check():
            print(note, flush=True)
        writer = Writer(captioner, wording, limits, Pace(per_minute), _length(options["model.weights"]))
        return describe(clips, writer, sampling, 1 if is_local else workers, folder / LOG_NAME, prices)
    finally:
        captioner.close()


def _captioner(options: dict[str, str], is_local: bool) -> "Captioner":
    max_tokens = whole_number("max_tokens", options["max_tokens"], 1)
    if is_local:
        from mochi_tune.data_prep.local_captioner import LocalCaptioner

        return LocalCaptioner(user_path(options["model"]), options["device"], max_tokens)
    from mochi_tune.data_prep.endpoint import Endpoint

    return Endpoint(options["endpoint"], options["model"], _key(options["key_file"], options["endpoint"]), max_tokens)


def _key(path: str, endpoint: str) -> str:
    """Returns the key in the file, else the one in the environment if it belongs to this endpoint.

    The endpoint may be chosen by somebody who does not own the key, such as a user of the page.
    """
    if not path:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        named = os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI_URL
        if key and _plain(endpoint) != _plain(named):
            print(
                f"OPENAI_API_KEY is the key of {named} and is not sent to endpoint={endpoint}: to send it, set "
                "OPENAI_BASE_URL to that address, or give key_file=",
                flush=True,
            )
            return ""
        return key
    try:
        key = user_path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise ConfigError(f"key_file={path} cannot be read ({reason}): name a file that holds the API key.") from None
    if not key:
        raise ConfigError(f"key_file={path} is empty: write the API key there.")
    return key


def _plain(url: str) -> str:
    return url.rstrip("/").removesuffix("/chat/completions")


def _wording(options: dict[str, str]) -> "Wording":
    from mochi_tune.data_prep.captioning import Wording

    if options["language"] not in ("en", "any"):
        raise ConfigError(f"language={options['language']} is not possible: use en or any.")
    language = "any" if options["language"] == "any" else "en"
    trigger = " ".join(options["trigger"].split())
    if not options["template"]:
        return Wording("", trigger, language)
    path = user_path(options["template"])
    try:
        text = path.read_bytes()[: MAX_TEMPLATE_BYTES + 1].decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise ConfigError(f"template={path} cannot be read ({reason}): name a text file.") from None
    if not text.strip() or len(text) > MAX_TEMPLATE_BYTES:
        raise ConfigError(f"template={path} is empty or too large for a prompt: write the prompt there.")
    if "{trigger}" in text and not trigger:
        raise ConfigError(f"template={path} asks for {{trigger}}: add trigger=WORD.")
    return Wording(text, trigger, language)


def _prices(options: dict[str, str]) -> "Prices | None":
    from mochi_tune.data_prep.describe_tally import Prices

    keys = ("price_in", "price_out")
    return Prices(*(_number_or_zero(options, key) for key in keys)) if any(options[key] for key in keys) else None


def _length(weights: str) -> "CaptionLength":
    from mochi_tune.data_prep.answers import MAX_WORDS_UNCOUNTED, CaptionLength
    from mochi_tune.weights.folder import WeightsFolder

    folder = WeightsFolder(user_path(weights))
    if folder.has_tokenizer():
        return CaptionLength(folder.load_tokenizer())
    print(
        f"T5's tokenizer is not in model.weights={weights}: captions of more than {MAX_WORDS_UNCOUNTED} words are "
        "shortened, in place of those of more than 256 tokens",
        flush=True,
    )
    return CaptionLength(None)


def _number_or_zero(options: dict[str, str], key: str) -> float:
    return 0.0 if options[key] in ("", "0") else positive_number(key, options[key])
