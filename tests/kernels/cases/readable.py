"""Names of cases, for the ids of tests."""

from dataclasses import fields


class Readable:
    """A dataclass whose string says what is not as usual."""

    def __str__(self) -> str:
        values = ((each.name, getattr(self, each.name), each.default) for each in fields(self))  # type: ignore[arg-type]
        return ", ".join(f"{name} {value}" for name, value, usual in values if value != usual)
