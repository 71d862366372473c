"""`tfm-guard serve`: the management API in a server of its own."""

import asyncio
import os
import socket
from typing import TYPE_CHECKING, Final

import click

from tfm_guard.cli.failures import Failure

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_CLOSING_SECONDS: Final = 10  # within which requests under way end


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=8000,
    show_default=True,
    help="The port to listen at; 0 is a free one.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="How many processes serve.",
)
def serve(host: str, port: int, workers: int) -> None:
    """Serve the management API, /v1/api-keys/, for as long as it is not ended.

    Beside an application that only verifies keys, or for one that is not written in Python. It
    speaks plain HTTP: keys can be read on the way, so let it listen on this machine alone, behind
    something that speaks TLS. Needs the extra server: pip install 'tfm-guard[server]'.
    """
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise Failure("serving needs a server, uvicorn: pip install 'tfm-guard[server]'") from error
    # What is wrong is told here, with its exit code, and not by each process over and over.
    _try_port(host, port)
    asyncio.run(_try_database())
    uvicorn.run(
        "tfm_guard.cli.serve:make_app",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        lifespan="on",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )


def _try_port(host: str, port: int) -> None:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        number = error.errno or 0  # below 0 for a name that leads nowhere
        cause = os.strerror(number) if number > 0 else error.strerror
        raise Failure(
            f"{host}, port {port}, cannot be used: {cause}; choose others: --host ADDRESS, --port N"
        ) from error


async def _try_database() -> None:
    from tfm_guard.guard import Guard

    async with Guard.from_environment():
        pass


def make_app() -> "ASGIApp":
    """Return the app that `tfm-guard serve` serves."""
    from tfm_guard.guard import Guard

    return Guard.from_environment().management_app()
