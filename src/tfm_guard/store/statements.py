"""Statements that a server process of PostgreSQL may keep prepared."""

from typing import NamedTuple


class Statement(NamedTuple):
    """SQL with *parameters* in it, like `%(key_id)s::uuid`; *script* is what it is part of."""

    name: str
    text: str
    parameters: tuple[str, ...] = ()
    script: str = "{}"

    @property
    def preparation(self) -> str:
        """What prepares it."""
        numbers = {name: f"${number}" for number, name in enumerate(self.parameters, start=1)}
        return f"PREPARE {self.name} AS {self.text % numbers}"

    @property
    def execution(self) -> str:
        """The script where it has been prepared."""
        arguments = ", ".join(f"%({name})s" for name in self.parameters)
        return self.script.format(f"EXECUTE {self.name}" + (f" ({arguments})" if arguments else ""))

    @property
    def unprepared(self) -> str:
        """The script where it has not."""
        return self.script.format(self.text)
