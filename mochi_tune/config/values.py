"""The building blocks of the schema: the types of values, and the declaration of a setting."""

import os
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

# Whether a run may resume from a checkpoint with another value of a setting:
# "free": yes, it does not change the result. "bound": only with resume=force, as another run.
# "held": no, the saved weights and optimizer state would not fit.
Resume = Literal["free", "bound", "held"]
SEED_LIMIT = 2**63
_DIGITS = re.compile(r"[+-]?[0-9]+")
# A repository of the hub. Source: huggingface/huggingface_hub@2.4 utils/_validators.py (validate_repo_id).
_REPO = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?(?<!\.git)", re.ASCII)


def _read_text(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("not_possible", "text in quotes, as yes, no, on and off are true and false in YAML")
    # YAML reads `name: 123` as a number.
    return str(value) if isinstance(value, int | float) else value


def _check_text(value: str) -> str:
    if "\0" in value:
        raise PydanticCustomError("not_possible", "text without NUL")
    return value


def _check_not_blank(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("empty", "empty")
    return value


def check_folder_name(value: str) -> str:
    """Refuses names of a run whose folders would be outside runs/ and cache/, or these folders themselves."""
    if {".", ".."} & set(value.split("/")):
        raise PydanticCustomError("not_possible", "a name such as my_lora, without . or .. as a folder")
    return value


def check_project(value: str) -> str:
    """Refuses project names that W&B or trackio would refuse."""
    if len(value) > 128 or set(value) & set("/\\#?%:"):
        raise PydanticCustomError("not_possible", "up to 128 characters, none of / \\ # ? % :")
    return value


def check_source_name(value: str) -> str:
    """Refuses names of sources that cannot be a folder, which datasets and previews of the source are in."""
    is_folder = value.isprintable() and value == value.strip() and not set(value) & set("/\\")
    if not is_folder or value[:1] in ("", ".") or len(value.encode()) > 100:
        raise PydanticCustomError("not_possible", "up to 100 printable characters, none of / \\, no . in front")
    return value


def is_repo(value: str) -> bool:
    """Whether a text can name a repository of the hub, as owner/name."""
    return len(value) <= 96 and _REPO.fullmatch(value) is not None


def _check_repo(value: str) -> str:
    if not is_repo(value):
        raise PydanticCustomError("not_possible", "owner/name, of letters, digits, -, . and _")
    return value


def _check_shard(value: str) -> str:
    number, _, count = value.partition("/")
    is_share = all(part.isascii() and part.isdigit() for part in (number, count)) and 1 <= int(number) <= int(count)
    if value != "merge" and not is_share:
        raise PydanticCustomError("not_possible", "1/16 to 16/16, of any number, or merge")
    return value


def refuse_bool(value: Any) -> Any:
    """Refuses true and false, which pydantic converts to 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "not a number")
    return value


def _check_whole(value: Any) -> Any:
    # pydantic converts 4.0 and "4.0" to 4, and "0-3" to -3.
    if isinstance(value, bool | float) or (isinstance(value, str) and not _DIGITS.fullmatch(value)):
        raise PydanticCustomError("not_a_whole_number", "not a whole number")
    return value


def read_off(value: Any) -> Any:
    """Converts false back to the word off."""
    # YAML reads a bare `off` as false.
    return "off" if value is False else value


Text = Annotated[str, BeforeValidator(_read_text), AfterValidator(_check_text)]
Name = Annotated[Text, AfterValidator(_check_not_blank)]
# A file or a folder; `~` is the home folder, as in a shell. An empty path would be the current folder.
FileName = Annotated[Name, AfterValidator(os.path.expanduser)]
# It is in the names of clips, and a folder.
SourceName = Annotated[Text, AfterValidator(check_source_name)]
Repo = Annotated[Text, AfterValidator(_check_repo)]
Shard = Annotated[Text, AfterValidator(_check_shard)]
Whole = Annotated[int, BeforeValidator(_check_whole)]
Count = Annotated[Whole, Field(ge=1)]
CountOrZero = Annotated[Whole, Field(ge=0)]
Number = Annotated[float, BeforeValidator(refuse_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of settings. `RESUME` is the default rule for resuming."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    RESUME: ClassVar[Resume] = "bound"


def setting(default: Any, meaning: str, resume: Resume | None = None) -> Any:
    """Declares a setting.

    Args:
        default: default value; `...` if the setting is required. `${name}` is the value of `name`.
        meaning: one line: the unit, what the setting does, what it costs.
        resume: whether a resumed run may have another value; None for the rule of the section.
    """
    return Field(default, description=meaning, json_schema_extra={"resume": resume} if resume else None)
