"""Settings by their dotted keys: their declarations in the schema, and their values in a config."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mochi_tune.config.schema import RunConfig
from mochi_tune.config.values import Resume, Section

# Sections that a packaged file can set: `model=tiny` is conf/model/tiny.yaml.
GROUPS = ("model", "lora", "memory", "parallel")


@dataclass(frozen=True)
class Setting:
    """The declaration of a setting.

    Attributes:
        key: dotted key.
        type: type without constraints, such as `float | None`.
        default: default value; None if the setting is required.
        is_required: whether it must be set.
        meaning: description in one line.
        resume: whether a resumed run may have another value.
        choices: allowed values, if they are few.
        limits: of a number or each number in it, by "gt", "ge", "lt", "le"; "allow_inf_nan" is False if it is finite.
    """

    key: str
    type: Any
    default: Any
    is_required: bool
    meaning: str
    resume: Resume
    choices: tuple[str | None, ...]
    limits: dict[str, Any]

    @property
    def takes_list(self) -> bool:
        """Whether a list is an allowed value."""
        return any(get_origin(part) is list for part in (self.type, *get_args(self.type)))

    @property
    def takes_text(self) -> bool:
        """Whether any text is an allowed value, or a list of texts."""
        return bool({str, list[str]} & {self.type, *get_args(self.type)})

    @property
    def takes_numbers(self) -> bool:
        """Whether a list of numbers is an allowed value, and text is not."""
        parts = (self.type, *get_args(self.type))
        return str not in parts and any(part in (list[int], list[float]) for part in parts)

    @property
    def takes_one(self) -> bool:
        """Whether a number by itself is an allowed value."""
        return bool({int, float} & {self.type, *get_args(self.type)})


@cache
def known_keys() -> dict[str, Setting]:
    """Returns the declaration of each setting, by dotted key."""
    found = {}
    for section, cls in sections().items():
        types, annotated = get_type_hints(cls), get_type_hints(cls, include_extras=True)
        for name, info in cls.model_fields.items():
            if not section and name in sections():
                continue
            key = f"{section}.{name}" if section else name
            extra: Any = info.json_schema_extra or {}
            default = None if info.is_required() else info.default
            found[key] = Setting(
                key, types[name], default, info.is_required(), info.description or "",
                extra.get("resume", cls.RESUME), _choices(types[name]), _limits([annotated[name], info]),
            )  # fmt: skip
    return found


def sections() -> dict[str, type[Section]]:
    """Returns the sections by name; "" is the top level."""
    fields = {name: info.annotation for name, info in RunConfig.model_fields.items()}
    return {"": RunConfig} | {n: cls for n, cls in fields.items() if isinstance(cls, type) and issubclass(cls, Section)}


def _choices(kind: Any) -> tuple[str | None, ...]:
    """Returns the values of a Literal, with None if null is allowed."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    parts = [_choices(part) for part in get_args(kind) if part is not type(None)]
    return (*parts[0], None) if len(parts) == 1 and parts[0] and type(None) in get_args(kind) else ()


def _limits(parts: Iterable[Any]) -> dict[str, Any]:
    """Returns the limits in an annotation, at any depth."""
    found: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, FieldInfo):
            for name in ("gt", "ge", "lt", "le", "allow_inf_nan"):
                values = [getattr(constraint, name, None) for constraint in part.metadata]
                found.update((name, value) for value in values if value is not None)
        else:
            found |= _limits(get_args(part))
    return found


def resume_rule(key: str) -> Resume:
    """Returns whether a resumed run may have another value of a key; keys that are not settings are "bound"."""
    return known_keys()[key].resume if key in known_keys() else "bound"


def value_of(config: RunConfig, key: str) -> Any:
    """Returns the value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Returns every setting by its dotted key, as JSON values."""
    return {key: _plain(value_of(config, key)) for key in known_keys()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.model_dump() if isinstance(value, BaseModel) else value


def rename_old(settings: dict[str, Any], section: str = "") -> None:
    """Replaces, in place, the setting of version 0.1.0 that has another name and other values now.

    Args:
        settings: the section `train` by names, or all settings by dotted keys.
        section: "train." for dotted keys.
    """
    old, new = f"{section}gradient_checkpointing", f"{section}recompute"
    if new not in settings and isinstance(settings.get(old), bool):
        settings[new] = "block" if settings.pop(old) else "none"
