"""Calling an API over a socket, as its clients do."""

import contextlib
import http.client
import json
from email.message import Message
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from click.testing import CliRunner

from tfm_guard.cli import main

EMAIL = {
    "from_": {"email": "shop@example.com"},
    "to": [{"email": "customer@example.com"}],
    "subject": "Your receipt",
    "text": "Thank you.",
}


class Answer(NamedTuple):
    """What came back for one request."""

    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)


def call(
    url: str, method: str, path: str, *, token: str | None = None, body: object = None
) -> Answer:
    """Send one request on a connection of its own."""
    address = urlsplit(url)
    assert address.hostname is not None
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    with contextlib.closing(connection):
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, headers)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


def first_token(database_url: str, *scopes: str, account: str = "acme") -> str:
    """Create a key at the command line, as operators do, and return its token."""
    arguments = ["keys", "create", "--account", account, "--name", "First"]
    for scope in scopes:
        arguments += ["--scope", scope]
    result = CliRunner().invoke(main, arguments, env={"TFM_GUARD_DATABASE_URL": database_url})
    assert result.exit_code == 0, result.stderr
    return result.stdout.strip()
