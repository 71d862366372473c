"""What schemathesis is told about this API: which keys to use, and what else to check.

It is loaded by schemathesis, in whose process it runs; the environment says which keys there are.

How each operation comes to succeed: every key whose id is sent is made for that one request. That
is so for the id of the description's examples, which are all tried, and for every second of the ids
that are made up; some of the others become that of the key before, which may have been rotated or
deleted since. Whoever revokes its own key does it with one that was made for that.
"""

import json
import os
from typing import Any, Final
from uuid import UUID

import schemathesis

from tests.fuzz.seen import Seen
from tests.support.api import call

URL: Final = os.environ["FUZZ_URL"]
TOKEN: Final = os.environ["FUZZ_TOKEN"]
MAKER_TOKEN: Final = os.environ["FUZZ_MAKER_TOKEN"]
# The keys of the fuzzer itself, which it learns from the list.
KEPT: Final = frozenset(map(UUID, os.environ["FUZZ_KEPT"].split(",")))
SEEN: Final = Seen(os.environ["FUZZ_SEEN"])

EXAMPLE: Final = UUID("6f1c2a9e-4a0b-4f6e-9d53-0c7d8e21b4aa")

# The ids of the keys that were made for a request.
used: Final[list[str]] = []

# What a JSON schema cannot say of a value: which characters are visible, which moments have passed,
# which scopes a key has, that one of two fields is needed.
BEYOND_SCHEMAS: Final = frozenset(
    {
        "string_too_short",
        "string_control",
        "string_token",
        "datetime_future",
        "datetime_range",
        "scope_added",
        "missing",
    }
)
# What the server adds to each answer by itself.
OF_THE_SERVER: Final = frozenset({"content-length", "content-type", "date", "server"})


def new_key() -> dict[str, Any]:
    """Make a key that is used once."""
    body = {"name": "for one request", "permissions": ["send", "audit:read"]}
    answer = call(URL, "POST", "/v1/api-keys/", token=MAKER_TOKEN, body=body)
    assert answer.status == 201, answer
    created: dict[str, Any] = answer.json
    return created


@schemathesis.auth(refresh_interval=None)
class Keys:
    """Sends the fuzzer's key, and one that may be lost where the key that is sent is revoked."""

    def get(self, _case: schemathesis.Case[Any], context: schemathesis.AuthContext) -> str:
        """Return the token for a request."""
        lost = context.operation.path == "/v1/api-keys/self/revoke"
        return str(new_key()["key"]) if lost else TOKEN

    def set(
        self, case: schemathesis.Case[Any], data: str, _context: schemathesis.AuthContext
    ) -> None:
        """Put the token in the request."""
        case.headers["Authorization"] = f"Bearer {data}"


@schemathesis.hook
def before_call(
    _context: schemathesis.HookContext, case: schemathesis.Case[Any], _kwargs: dict[str, Any]
) -> None:
    """Give the request a key of its own to do its work on, unless it is to fail."""
    parameters = case.path_parameters or {}
    try:
        key_id = UUID(str(parameters["key_id"]))
    except (KeyError, ValueError):
        return
    if key_id == EXAMPLE or key_id in KEPT or key_id.int % 2:
        used.append(new_key()["id"])
    elif key_id.int % 4 == 0 or not used:
        return
    parameters["key_id"] = used[-1]


@schemathesis.hook
def after_call(
    _context: schemathesis.HookContext,
    case: schemathesis.Case[Any],
    response: schemathesis.Response,
) -> None:
    """Note which operation was answered how."""
    SEEN.note(case.operation.definition.raw["operationId"], case.method, response.status_code)


@schemathesis.check
def every_header_is_described(
    _context: schemathesis.CheckContext,
    response: schemathesis.Response,
    case: schemathesis.Case[Any],
) -> None:
    """No answer has a header that the description does not have for its status."""
    described = case.operation.definition.raw["responses"].get(str(response.status_code))
    if described is None:  # that is another check's
        return
    unknown = set(response.headers) - OF_THE_SERVER - set(described["headers"])
    assert not unknown, f"headers that are not described: {sorted(unknown)}"


@schemathesis.check
def what_fits_is_taken(
    _context: schemathesis.CheckContext,
    response: schemathesis.Response,
    case: schemathesis.Case[Any],
) -> None:
    """What the description allows is refused only for what no schema can say."""
    if response.status_code != 422 or case.meta is None:
        return
    if case.meta.generation.mode.is_positive:
        faults = json.loads(response.content)["detail"]
        wrong = [fault for fault in faults if not _is_beyond_schemas(fault)]
        assert not wrong, f"refused although it fits: {wrong}"


def _is_beyond_schemas(fault: dict[str, str]) -> bool:
    # JSON schema takes 1.0 for an integer, which is written like a float.
    return fault["type"] in BEYOND_SCHEMAS or fault["msg"] == "Expected `int`, got `float`"
