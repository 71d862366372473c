"""The description of the management API: OpenAPI 3.1, from the types that read its requests."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
from msgspec import Struct

from tfm_guard import __version__
from tfm_guard.errors import (
    AlreadyReplaced,
    InsufficientScope,
    InvalidInput,
    InvalidRequest,
    InvalidToken,
    KeyNotFound,
    MissingCredentials,
    NotAllowed,
    NotConfirmed,
    PlanLimitReached,
    Refusal,
    Unavailable,
)
from tfm_guard.http.messages import (
    AuditQuery,
    BodyTooLarge,
    ChangeKeyRequest,
    CreatedKeyResponse,
    CreateKeyRequest,
    KeyRow,
    RotatedKeyResponse,
    RotateKeyRequest,
    UsageQuery,
)
from tfm_guard.http.persons import CrossOrigin
from tfm_guard.http.refusals import FaultsBody, PlanLimitBody, RefusalBody, body_of, headers_of
from tfm_guard.records import AuditPage, AuditRow, KeyUsage, UsageBucket
from tfm_guard.scopes import ScopeRegistry

Json = dict[str, Any]

_REFERENCE: Final = "#/components/schemas/{name}"

_ID: Final = UUID("6f1c2a9e-4a0b-4f6e-9d53-0c7d8e21b4aa")
_NEXT_ID: Final = UUID("b2d9f7c4-1e5a-47b8-8a36-95f0c3d1e26b")
_MOMENT: Final = datetime(2030, 1, 31, 12, tzinfo=UTC)
_TOKEN: Final = "tfm_k_1a2b3c4d" + "0" * 40  # its tag does not match
_CREATED: Final[Json] = {
    "name": "CI",
    "key": _TOKEN,
    "key_prefix": "1a2b3c4d",
    "permissions": ["send"],
    "created_at": _MOMENT,
}
_ROW: Final = KeyRow(
    id=_ID,
    name="CI",
    key_prefix="1a2b3c4d",
    permissions=["send"],
    is_active=True,
    last_used_at=None,
    created_at=_MOMENT,
    expires_at=None,
    replaced_by=None,
    status="never_used",
)
_AUDIT_ROW: Final = AuditRow(
    id=1,
    actor=f"api_key:{_NEXT_ID}",
    action="api_key.created",
    target_type="API key",
    target_name="CI",
    target_id=str(_ID),
    category="Security",
    meta={"key_prefix": "1a2b3c4d", "permissions": ["send"]},
    request_id=None,
    created_at=_MOMENT,
)


class Operation(NamedTuple):
    """A method of a path: what it takes, and all that it may answer."""

    id: str
    summary: str
    status: int
    scope: str | None = None
    needs_key: bool = True
    body: Struct | None = None  # an example of what it takes
    body_required: bool = True
    query: type[Struct] | None = None
    answer: Any = None  # an example of what it answers
    answer_as: Any = None  # that of the example, if nothing else is said
    refusals: tuple[Refusal, ...] = ()

    @property
    def answer_kind(self) -> Any:
        """The type of what it answers, if it answers something."""
        if self.answer is None:
            return None
        return self.answer_as or type(self.answer)

    @property
    def body_kind(self) -> type[Struct] | None:
        """The type of what it takes, if it takes something."""
        return None if self.body is None else type(self.body)

    @property
    def changes(self) -> bool:
        """Whether it is for those only who may manage keys."""
        return self.scope == "api-keys:write"

    def all_refusals(self) -> list[Refusal]:
        """Return an example of each refusal, by status."""
        found: list[Refusal] = [*self.refusals]
        if self.needs_key:
            found += [InvalidRequest(), MissingCredentials(), InvalidToken(""), Unavailable("")]
        if self.scope is not None:
            found.append(InsufficientScope(frozenset({self.scope})))
        if self.changes:
            found += [NotAllowed(), CrossOrigin()]
        if self.body is not None:
            found.append(BodyTooLarge())
        if self.query is not None:
            found.append(InvalidInput(("query", "range"), "invalid", "Invalid enum value '1d'"))
        return sorted(found, key=lambda refusal: (refusal.status, refusal.code))


_NO_KEY: Final = KeyNotFound()
_NO_ID: Final = InvalidInput(("path", "key_id"), "uuid_parsing", "Expected the id of a key")
_NO_NAME: Final = InvalidInput(("body", "name"), "missing", "Field required")

OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = {
    ("/v1/api-keys/", "GET"): Operation(
        id="listKeys",
        summary="List the account's active keys, newest first.",
        status=200,
        scope="api-keys:read",
        answer=[_ROW],
        answer_as=list[KeyRow],
    ),
    ("/v1/api-keys/", "POST"): Operation(
        id="createKey",
        summary="Create a key. The caller needs each scope that it grants.",
        status=201,
        scope="api-keys:write",
        body=CreateKeyRequest(name="CI"),
        answer=CreatedKeyResponse(id=_ID, **_CREATED),
        refusals=(_NO_NAME, PlanLimitReached(plan="free", limit=2, current=2)),
    ),
    ("/v1/api-keys/{key_id}", "PATCH"): Operation(
        id="changeKey",
        summary="Rename a key, or take scopes from it; they are gone everywhere when it answers.",
        status=200,
        scope="api-keys:write",
        body=ChangeKeyRequest(name="CI, for the web site"),
        answer=_ROW,
        refusals=(_NO_ID, _NO_KEY, NotConfirmed()),
    ),
    ("/v1/api-keys/{key_id}", "DELETE"): Operation(
        id="deleteKey",
        summary="Revoke a key for good; it is refused everywhere when this answers.",
        status=204,
        scope="api-keys:write",
        refusals=(_NO_ID, _NO_KEY, NotConfirmed()),
    ),
    ("/v1/api-keys/{key_id}/rotate", "POST"): Operation(
        id="rotateKey",
        summary="Create a key that takes the place of another, which works on for a grace. "
        "The caller needs each scope of that key.",
        status=201,
        scope="api-keys:write",
        body=RotateKeyRequest(grace_seconds=3600),
        body_required=False,
        answer=RotatedKeyResponse(id=_NEXT_ID, **_CREATED, replaces=_ID, confirmed=True),
        refusals=(_NO_ID, _NO_KEY, AlreadyReplaced("This key was rotated already.")),
    ),
    ("/v1/api-keys/{key_id}/usage", "GET"): Operation(
        id="getKeyUsage",
        summary="Count how often a key was accepted and refused, by hour or day; also of a "
        "key that was revoked.",
        status=200,
        scope="api-keys:read",
        query=UsageQuery,
        answer=KeyUsage(
            range="24h",
            unit="hour",
            accepted=17,
            refused=1,
            buckets=[UsageBucket(start=_MOMENT, accepted=17, refused=1)],
        ),
        refusals=(_NO_ID, _NO_KEY),
    ),
    ("/v1/api-keys/self/revoke", "POST"): Operation(
        id="revokeOwnKey",
        summary="Revoke the key with which this is asked, whatever its scopes.",
        status=204,
        refusals=(NotAllowed(), CrossOrigin(), NotConfirmed()),
    ),
    ("/v1/audit-log", "GET"): Operation(
        id="listAuditLog",
        summary="List what was done to the account's keys, newest first; with filters, only the "
        "rows that have exactly these values.",
        status=200,
        scope="audit:read",
        query=AuditQuery,
        answer=AuditPage(items=[_AUDIT_ROW], range="30d", total=1),
    ),
    ("/v1/openapi.json", "GET"): Operation(
        id="getDescription",
        summary="Describe this API.",
        status=200,
        needs_key=False,
        answer={"openapi": "3.1.0"},
    ),
}

_NO_STORE: Final = frozenset({"cache-control"})
_HEADERS: Final[Json] = {
    "cache-control": {"schema": {"const": "no-store"}},
    "www-authenticate": {
        "description": "The challenge of RFC 6750.",
        "schema": {"type": "string", "pattern": "^Bearer realm="},
    },
    "retry-after": {
        "description": "In how many seconds to ask again.",
        "schema": {"type": "integer", "minimum": 1},
    },
}
# Of an answer to a key that is replaced.
_GRACE_HEADERS: Final[Json] = {
    "deprecation": {
        "description": "Since when the key that was sent is replaced (RFC 9745).",
        "schema": {"type": "string", "pattern": "^@[0-9]+$"},
    },
    "sunset": {
        "description": "When the key that was sent, which is replaced, ends (RFC 8594).",
        "schema": {"type": "string", "pattern": " GMT$"},
    },
}
_KEY_ID: Final[Json] = {
    "name": "key_id",
    "in": "path",
    "required": True,
    "description": "The id of a key of the account.",
    "schema": {"type": "string", "format": "uuid"},
    "example": str(_ID),
}
_REQUEST_ID: Final[Json] = {
    "name": "X-Request-ID",
    "in": "header",
    "description": "Is kept in the audit log, if it is 1 to 128 printable ASCII characters.",
    "schema": {"type": "string"},
}


def describe(scopes: ScopeRegistry, realm: str) -> Json:
    """Return the OpenAPI document, but for its servers."""
    paths: Json = {}
    types: list[Any] = [RefusalBody, PlanLimitBody, FaultsBody]
    for (path, method), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(path, method, operation, realm)
        types += [kind for kind in (operation.answer_kind, operation.body_kind) if kind is not None]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "API keys",
            "version": __version__,
            "description": "Manages the API keys of the account that the caller is of. What is not "
            "described here is answered 404 `not_found` or 405 `method_not_allowed`.",
        },
        "paths": paths,
        "components": {
            "schemas": _components(types, scopes),
            "securitySchemes": {"api_key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(path: str, method: str, operation: Operation, realm: str) -> Json:
    described: Json = {"operationId": operation.id, "summary": operation.summary}
    described["security"] = (
        [{"api_key": [] if operation.scope is None else [operation.scope]}]
        if operation.needs_key
        else []
    )
    parameters = [_KEY_ID] if "{key_id}" in path else []
    if method != "GET":
        parameters.append(_REQUEST_ID)
    if operation.query is not None:
        parameters += _query_parameters(operation.query)
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        content = _content(_schema(operation.body_kind), example=operation.body)
        described["requestBody"] = {"required": operation.body_required, "content": content}
    described["responses"] = _responses(operation, realm)
    return described


def _query_parameters(query: type[Struct]) -> list[Json]:
    schema = msgspec.json.schema(query)["$defs"][query.__name__]
    found = []
    for name, values in schema["properties"].items():
        described = {key: values.pop(key) for key in ("description",) if key in values}
        found.append({"name": name, "in": "query", **described, "schema": values})
    return found


def _responses(operation: Operation, realm: str) -> Json:
    grace = _GRACE_HEADERS if operation.needs_key else {}
    success: Json = {"description": "Done.", "headers": _described(_HEADERS, [_NO_STORE]) | grace}
    if operation.answer_kind is not None:
        success["content"] = _content(_schema(operation.answer_kind), example=operation.answer)
    responses = {str(operation.status): success}
    by_status = groupby(operation.all_refusals(), key=lambda refusal: refusal.status)
    for status, refusals in by_status:
        refused = [*refusals]
        headers = [headers_of(refusal, realm).keys() for refusal in refused]
        responses[str(status)] = {
            "description": " ".join(dict.fromkeys(map(_sentence, refused))),
            "headers": _described(_HEADERS, headers) | grace,
            "content": _content(_refusal_schema(refused), examples=_examples(refused)),
        }
    return responses


def _described(headers: Json, sent: Sequence[Collection[str]]) -> Json:
    """Return the headers of one status, required where all answers that have it send them."""
    return {
        name: {"required": all(name in each for each in sent), **header}
        for name, header in headers.items()
        if any(name in each for each in sent)
    }


def _sentence(refusal: Refusal) -> str:
    assert refusal.__doc__ is not None  # noqa: S101  # as of every public class
    return refusal.__doc__.partition("\n\n")[0].replace("*", "`")


def _refusal_schema(refusals: Iterable[Refusal]) -> Json:
    codes: dict[type[Struct], list[str]] = {}
    for refusal in refusals:
        codes.setdefault(type(body_of(refusal)), []).append(refusal.code)
    schemas = [_with_codes(kind, of_kind) for kind, of_kind in codes.items()]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _with_codes(kind: type[Struct], codes: Sequence[str]) -> Json:
    if kind is FaultsBody:  # which has none
        return _schema(kind)
    one_of_them = {"properties": {"code": {"enum": sorted(set(codes))}}}
    return {"allOf": [_schema(kind), {"properties": {"detail": one_of_them}}]}


def _examples(refusals: Iterable[Refusal]) -> Json:
    return {
        " ".join(map(str, refusal.field)) if isinstance(refusal, InvalidInput) else refusal.code: {
            "value": msgspec.to_builtins(body_of(refusal))
        }
        for refusal in refusals
    }


def _content(schema: Json, *, example: Any = None, examples: Json | None = None) -> Json:
    shown = {"examples": examples} if examples else {"example": msgspec.to_builtins(example)}
    return {"application/json": {"schema": schema, **shown}}


def _schema(kind: Any) -> Json:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REFERENCE)
    return schema


def _components(types: Iterable[Any], scopes: ScopeRegistry) -> Json:
    _, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    # Which scopes there are is known when the app is made. A key may have others, of earlier.
    for request in (CreateKeyRequest, ChangeKeyRequest):
        permissions = components[request.__name__]["properties"]["permissions"]
        permissions["items"] = {"$ref": _REFERENCE.format(name="Scope")}
    known = [{"const": name, "description": text} for name, text in scopes.descriptions.items()]
    components["Scope"] = {"type": "string", "oneOf": known}
    return components
