"""The description of the management API."""

import re
from typing import Any

from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from tests.http.managing import AUDIT, KEYS, Api
from tests.http.support import Answer, call, http_scope, make_guard
from tfm_guard import Guard, Person, __version__
from tfm_guard.http.management import ManagementApp

PATH = "/v1/openapi.json"
OF_A_BODY = {"content-length", "content-type"}


async def described(guard: Guard) -> dict[str, Any]:
    """Return the description as anybody gets it."""
    answer = await call(guard.management_app(), http_scope(path=PATH))
    assert (answer.status, answer.header("content-type")) == (200, "application/json")
    found: dict[str, Any] = answer.json
    return found


def operations(description: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return all operations, by path and method."""
    return {
        (path, method.upper()): operation
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    }


async def test_it_is_valid(guard: Guard) -> None:
    """It is an OpenAPI 3.1 document, of this release."""
    description = await described(guard)
    validate(description)
    assert description["openapi"].startswith("3.1.")
    assert description["info"]["version"] == __version__


async def test_it_has_every_route_and_no_other(guard: Guard) -> None:
    """Each path and method of the app is in it, but HEAD, which GET implies, and nothing else."""
    app = guard.management_app()
    assert isinstance(app, ManagementApp)
    routes = {
        (route.path, method)
        for route in app._app.routes  # noqa: SLF001  # nothing else leads to them
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    assert {(path, method) for path, method in routes if method != "HEAD"} == {
        *operations(await described(guard))
    }
    assert len(routes) > 9


async def test_it_needs_no_key(guard: Guard) -> None:
    """Anybody may read it, with a bad key too, and where people are signed in; nothing else."""

    async def identify(_connection: object) -> Person | None:
        raise AssertionError

    bad = [(b"authorization", b"Bearer nonsense")]
    assert (await call(guard.management_app(), http_scope(path=PATH, headers=bad))).status == 200
    app = guard.management_app(identify=identify)
    assert (await call(app, http_scope(path=PATH))).status == 200
    assert (await call(guard.management_app(), http_scope("POST", PATH))).status == 405
    assert (await call(guard.management_app(), http_scope(path=PATH + "/"))).status == 401


async def test_it_says_where_it_is_mounted(guard: Guard) -> None:
    """The server is the mount's path, so that paths of operations lead to them."""
    app = Starlette(routes=[Mount("/manage", guard.management_app())])
    answer = await call(app, http_scope(path=f"/manage{PATH}"))
    assert answer.json["servers"] == [{"url": "/manage"}]
    assert (await described(guard))["servers"] == [{"url": "/"}]


async def test_each_operation_is_complete(guard: Guard) -> None:
    """Each has an id of its own, what it does, the scope that it needs, and its refusals."""
    found = operations(await described(guard))
    ids = [operation["operationId"] for operation in found.values()]
    assert len(set(ids)) == len(ids)
    for (path, _), operation in found.items():
        assert operation["summary"].endswith(".")
        statuses = set(operation["responses"])
        if path == PATH:
            assert (operation["security"], statuses) == ([], {"200"})
            continue
        (security,) = operation["security"]
        assert {"400", "401", "503"} <= statuses
        assert ("403" in statuses) == bool(security["api_key"] or path.endswith("self/revoke"))
        assert ("413" in statuses) == ("requestBody" in operation)
        named = re.findall(r"{(\w+)}", path)
        parameters = operation.get("parameters", [])
        assert named == [each["name"] for each in parameters if each["in"] == "path"]


async def test_bounds_are_those_that_are_kept(guard: Guard) -> None:
    """Names, graces, limits and ranges have the bounds and defaults that requests are held to."""
    description = await described(guard)
    schemas, found = description["components"]["schemas"], operations(description)
    name = schemas["CreateKeyRequest"]["properties"]["name"]
    assert (name["minLength"], name["maxLength"]) == (1, 100)
    grace = schemas["RotateKeyRequest"]["properties"]["grace_seconds"]
    assert (grace["minimum"], grace["maximum"], grace["default"]) == (0, 604_800, 86_400)
    parameters = {each["name"]: each for each in found["/v1/audit-log", "GET"]["parameters"]}
    assert {*parameters} == {"range", "limit", "category", "action", "actor", "target_id"}
    limit = parameters["limit"]["schema"]
    assert (limit["minimum"], limit["maximum"], limit["default"]) == (1, 500, 100)
    assert parameters["range"]["schema"]["default"] == "30d"
    (span,) = (
        each
        for each in found[f"{KEYS}{{key_id}}/usage", "GET"]["parameters"]
        if each["in"] == "query"
    )
    assert sorted(span["schema"]["enum"]) == ["24h", "30d", "7d", "90d"]
    assert span["schema"]["default"] == "24h"


async def test_scopes_are_those_that_are_registered(guard: Guard) -> None:
    """What may be granted is listed, with what it is for."""
    description = await described(guard)
    listed = description["components"]["schemas"]["Scope"]["oneOf"]
    assert {each["const"]: each["description"] for each in listed} == guard.scopes.descriptions


async def test_its_examples_fit(guard: Guard) -> None:
    """Each example in it is of the schema beside it."""
    description = await described(guard)
    checked = 0
    for operation in operations(description).values():
        for holder in (operation.get("requestBody", {}), *operation["responses"].values()):
            for content in holder.get("content", {}).values():
                shown = [each["value"] for each in content.get("examples", {}).values()]
                for example in shown or [content["example"]]:
                    _check(content["schema"], description, example)
                    checked += 1
    assert checked > 60


async def test_refusals_are_described(api: Api) -> None:
    """Refusals that need an occasion have their status, code and body in the description."""
    description = await described(api.guard)
    found, key, rotated = operations(description), f"{KEYS}{{key_id}}", f"{KEYS}{{key_id}}/rotate"
    await api.call("POST", api.path("sender", "/rotate"))
    met = [
        (KEYS, "GET", await api.call("GET", caller="sender")),
        (KEYS, "POST", await api.create(name="x", permissions=["webhooks:write"])),
        (KEYS, "POST", await api.create(name="x" * 70_000)),
        (KEYS, "POST", await api.create(name="\0")),
        (KEYS, "POST", await _at_the_limit(api)),
        (key, "PATCH", await api.call("PATCH", api.path("other"), {"name": "x"})),
        (key, "PATCH", await api.call("PATCH", api.path("manager"), {})),
        (key, "DELETE", await api.call("DELETE", api.path("other"))),
        (rotated, "POST", await api.call("POST", api.path("sender", "/rotate"))),
        (AUDIT, "GET", await api.call("GET", AUDIT)),
    ]
    assert [answer.status for *_, answer in met] == [
        403,
        403,
        413,
        422,
        403,
        404,
        422,
        404,
        409,
        403,
    ]
    for path, method, answer in met:
        response = found[path, method]["responses"][str(answer.status)]
        assert {name.decode() for name, _ in answer.headers} - OF_A_BODY <= {*response["headers"]}
        content = response["content"]["application/json"]
        _check(content["schema"], description, answer.json)
        assert answer.code is None or answer.code in content["examples"]


async def _at_the_limit(api: Api) -> Answer:
    async with make_guard(api.url, plans={"free": 1}) as guard:
        return await api._replace(guard=guard).create(name="x")


def _check(schema: dict[str, Any], description: dict[str, Any], value: object) -> None:
    """Check that *value* is of the *schema*, which may refer to the description's components."""
    OAS31Validator({**schema, "components": description["components"]}).validate(value)
