"""A small mail API behind API keys: the file to copy from.

    TFM_GUARD_DATABASE_URL=sqlite:///tfm_guard.db uvicorn examples.mail_api:app

With TFM_GUARD_REDIS_URL, its processes share what they have read. Make the first key with
`tfm-guard keys create`, further ones with `POST /v1/api-keys/` or on the page.
"""

import os
from collections import defaultdict, deque
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from uuid import UUID, uuid4

import msgspec
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route

from tfm_guard import APIKeyMiddleware, Guard, requires
from tfm_guard.http.sign_in import SignInLinks

# Other settings come from their own TFM_GUARD_* variables.
guard = Guard.from_urls(
    database=os.environ.get("TFM_GUARD_DATABASE_URL", "sqlite:///tfm_guard.db"),
    redis=os.environ.get("TFM_GUARD_REDIS_URL"),
)


class Address(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Whom an email is from or to."""

    email: str
    name: str | None = None


class EmailRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /v1/emails/`. `from_` is how the service's clients spell the sender."""

    from_: Address
    to: list[Address]
    subject: str
    html: str | None = None
    text: str | None = None


class Email(EmailRequest, kw_only=True):
    """An email that was accepted."""

    id: UUID
    status: str
    created_at: datetime


# The newest emails of each account. Each worker process has its own: a real service would send
# them and keep them in a database.
sent: defaultdict[str, deque[Email]] = defaultdict(partial(deque, maxlen=20))


class Emails(HTTPEndpoint):
    """`/v1/emails/`: each method asks for the scope that it needs."""

    @requires("send")
    async def post(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await request.body(), type=EmailRequest)
        except msgspec.DecodeError as error:
            detail = [{"loc": ["body"], "msg": str(error), "type": "invalid"}]
            return json_response(422, {"detail": detail})
        email = Email(
            **msgspec.structs.asdict(wanted),
            id=uuid4(),
            status="queued",
            created_at=datetime.now(UTC),
        )
        # request.user is the VerifiedKey. Its account, and nothing in the body, says whose it is.
        sent[request.user.account_id].appendleft(email)
        return json_response(202, {"id": email.id, "status": email.status})

    @requires("emails:read")
    async def get(self, request: Request) -> Response:
        return json_response(200, list(sent.get(request.user.account_id, ())))


async def health(_request: Request) -> Response:
    """Answer whoever watches over the service, without a key."""
    return PlainTextResponse("ok\n")


async def refuse(_request: Request, error: Exception) -> Response:
    """Answer a method that a path does not have in the form of all other errors."""
    if not isinstance(error, HTTPException):  # it is registered for nothing else
        raise error
    detail = {"code": HTTPStatus(error.status_code).name.lower(), "message": error.detail}
    return json_response(error.status_code, {"detail": detail}, error.headers)


def json_response(
    status: int, content: object, headers: Mapping[str, str] | None = None
) -> Response:
    """Return *content*, dates and UUIDs included, as JSON."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


api = Starlette(
    routes=[
        Route("/healthz", health),
        Route("/v1/emails/", Emails),
        # Serves /v1/api-keys/. It verifies its callers by itself, wherever it is mounted. It takes
        # all that is left and answers 404 to what it does not know, so it comes last.
        Mount("/", guard.management_app()),
    ],
    exception_handlers={HTTPException: refuse},
)
# The slash at the end belongs to the path: clients do not follow a redirected POST.
api.router.redirect_slashes = False

# Who is signed in to Settings → API Keys: here, whoever opens a link that `tfm-guard demo` prints.
# A service whose people sign in by themselves has `session_identity` or `jwt_identity` in its place
# (tfm_guard.http.identities), or an async function of its own, and no /sign-in.
sign_in = SignInLinks(to="../settings/api-keys/")

app = Starlette(
    routes=[
        Route("/settings/api-keys", lambda _: RedirectResponse("api-keys/")),
        Mount("/settings/api-keys", guard.console(identify=sign_in.identify)),
        Mount("/sign-in", sign_in),
        # Protects all that it stands in front of, paths that do not exist included. CORS
        # middleware, if you need it, goes around it.
        Mount("/", APIKeyMiddleware(api, guard=guard, exempt=("/healthz",))),
    ],
    # Opens the guard at start-up, and closes it at the end.
    lifespan=guard.lifespan,
)
