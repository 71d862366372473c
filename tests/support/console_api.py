"""An app with the page in it, in which a cookie says who is signed in: for tests in a browser."""

import os

from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.routing import Mount

from tfm_guard import Guard, Person, confirmation

# Some tests wait until revoking gives up.
confirmation.CONFIRM_SECONDS = 2.0  # type: ignore[misc]  # final, but for tests

guard = Guard.from_urls(
    database=os.environ["TFM_GUARD_DATABASE_URL"],
    scopes={"invoices:read": "Read invoices"},
)


async def identify(connection: HTTPConnection) -> Person | None:
    """Return the person that the cookie names: ACCOUNT-ROLE."""
    account, _, role = connection.cookies.get("who", "").partition("-")
    if not account:
        return None
    return Person(account_id=account, id=f"{role}@example.com", may_manage=role == "owner")


app = Starlette(
    routes=[
        Mount(
            "/settings/api-keys",
            guard.console(identify=identify, sign_in_url="/login", plans_url="/plans"),
        ),
        Mount("/", guard.management_app()),
    ],
    lifespan=guard.lifespan,
)
