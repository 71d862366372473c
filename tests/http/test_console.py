"""Settings → API Keys without a browser."""

from starlette.requests import HTTPConnection

from tests.http.support import call, http_scope
from tfm_guard import Guard, Person


async def owner(_c: HTTPConnection) -> Person | None:
    return Person(account_id="acme", id="ana", may_manage=True)


async def test_try(guard: Guard) -> None:
    c = await guard.keys.create(account_id="acme", name="CI", scopes=["send"])
    app = guard.console(identify=owner)
    for path in ("", "/rotate", "/delete"):
        answer = await call(app, http_scope(path=f"/{c.key.id}{path}"))
        print(answer.status, answer.body.decode()[:3000])
    assert 0
