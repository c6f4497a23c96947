"""How a key is declared: default, description, unit and limits in one call, readable by validation and by --help alike."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

READ_BACK = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""How values are checked that a dataclass (its ``__pydantic_config__``) was written from."""


class Section(BaseModel):
    """A frozen group of keys. Unknown keys are errors; an int is not a bool, a string is not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def key(default: Any, description: str, unit: str | None = None, **limits: Any) -> Any:
    """Declare a key. ``limits`` are pydantic's (ge, gt, le, lt, min_length); ``unit`` is shown by --help."""
    extra: Any = {"unit": unit} if unit else None
    if isinstance(default, (list, dict)) or (isinstance(default, type) and issubclass(default, BaseModel)):
        factory = default if isinstance(default, type) else (lambda: type(default)(default))
        return Field(default_factory=factory, description=description, json_schema_extra=extra, **limits)
    return Field(default=default, description=description, json_schema_extra=extra, **limits)


def in_words(error: Exception) -> str:
    """What is wrong with values that were read back, in a few words; the key first where pydantic found it."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
