"""How a command that does not succeed says so, and with which exit code."""

from typing import IO, Any, Final

import click

from tfm_guard.errors import ConfigurationError, GuardError, InvalidInput, Refusal, Unavailable

# Arguments of the library under the names that they have here.
_OPTIONS: Final = {
    "account_id": "account",
    "scopes": "--scope",
    "name": "--name",
    "expires_at": "--expires-at",
}


class Failure(click.ClickException):
    """The command did not succeed; *lines* say why and what to do, without anything secret."""

    exit_code = 1  # 2 is click's, for a command line that it cannot read

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self._lines = lines

    def show(self, file: IO[Any] | None = None) -> None:
        for line in self._lines:
            click.echo(f"tfm-guard: {line}", file=file, err=file is None)


class NotNow(Failure):
    """The command may succeed in a moment."""

    exit_code = 3


class Program(click.Group):
    """A group of commands in which errors of the library end the program without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GuardError as error:
            raise _failure(error) from error


def _failure(error: GuardError) -> Failure:
    if isinstance(error, ConfigurationError):
        return Failure(*error.faults, *_advice(error.faults))
    if isinstance(error, Unavailable):
        return NotNow(
            f"cannot be done now: {error.reason}",
            "check that the database runs, that TFM_GUARD_DATABASE_URL names it, and that you may "
            "write to it",
        )
    if isinstance(error, InvalidInput):
        return Failure(f"{_place(error.field)}: {error.message}")
    if isinstance(error, Refusal):
        return Failure(error.message)
    return Failure(str(error))


def _advice(faults: tuple[str, ...]) -> list[str]:
    if not any("TFM_GUARD_DATABASE_URL" in fault for fault in faults):
        return []
    return ["set it in the environment: export TFM_GUARD_DATABASE_URL=sqlite:///tfm_guard.db"]


def _place(field: tuple[str | int, ...]) -> str:
    name, *positions = field
    place = _OPTIONS.get(str(name), str(name))
    return " ".join([place, *(f"number {int(position) + 1}" for position in positions)])
