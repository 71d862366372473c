"""Looking into a database, and changing it, past the library."""

from typing import Any

from sqlalchemy import Executable, NullPool, create_engine, make_url, text
from sqlalchemy.engine import Engine

DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}


def engine_for(url: str) -> Engine:
    """Return an engine on *url* that keeps no connection open."""
    parsed = make_url(url)
    return create_engine(
        parsed.set(drivername=DRIVERS[parsed.get_backend_name()]), poolclass=NullPool
    )


def execute(url: str, statement: Executable | str) -> list[Any]:
    """Run *statement* in a transaction of its own and return its rows, if it has any."""
    if isinstance(statement, str):
        statement = text(statement)
    with engine_for(url).begin() as connection:
        result = connection.execute(statement)
        return list(result) if result.returns_rows else []
