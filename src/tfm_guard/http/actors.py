"""Who acts in a request, as the audit log names them."""

import re
from typing import Final

from starlette.requests import HTTPConnection

from tfm_guard.keys import actor_of
from tfm_guard.records import Actor, Person, VerifiedKey

# Of X-Request-ID, what the audit log takes: printable ASCII.
_REQUEST_ID: Final = re.compile(r"[ -~]{1,128}")


def actor_in(connection: HTTPConnection, caller: VerifiedKey | Person) -> Actor:
    """Return *caller* with the id that the request came with, if that can be logged as it is."""
    name = actor_of(caller) if isinstance(caller, VerifiedKey) else f"person:{caller.id}"
    match connection.headers.getlist("x-request-id"):
        case [request_id] if _REQUEST_ID.fullmatch(request_id):
            return Actor(name, request_id)
    return Actor(name)
