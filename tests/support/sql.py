"""Looking into a database, and changing it, past the library."""

from typing import Any

from sqlalchemy import Executable, NullPool, create_engine, make_url, text
from sqlalchemy.engine import Engine

DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}


def engine_for(url: str) -> Engine:
    """Return an engine on *url* that keeps no connection open."""
    parsed = make_url(url)
    drivername = DRIVERS[parsed.get_backend_name()]
    # On a busy machine others may hold SQLite's lock for longer than its usual 5 s.
    patience = {"timeout": 60} if drivername == "sqlite" else {}
    return create_engine(
        parsed.set(drivername=drivername), poolclass=NullPool, connect_args=patience
    )


def execute(url: str, statement: Executable | str) -> list[Any]:
    """Run *statement* in a transaction of its own and return its rows, if it has any."""
    if isinstance(statement, str):
        statement = text(statement)
    with engine_for(url).begin() as connection:
        result = connection.execute(statement)
        return list(result) if result.returns_rows else []
