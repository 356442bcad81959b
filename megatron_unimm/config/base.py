"""The base class of every config section."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """A config section: extra keys are refused, values are validated on assignment, defaults too."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def as_now(written: dict[str, Any], section: Section) -> dict[str, Any]:
    """What a file says of a section of this kind, with the defaults of fields that were added since it was written; as
    it stands where it is of another kind."""
    try:
        return type(section).model_validate(written).model_dump(mode="json")
    except ValidationError:
        return written
