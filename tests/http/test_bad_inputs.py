"""Bad requests of every kind, over real sockets and into the middleware, each with its answer.

The servers deliver different bytes for the same request, and refuse some themselves. Where one
does, its refusal is the right answer.
"""

import asyncio
import math
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple
from urllib.parse import unquote

import pytest
from starlette.types import Message, Scope

from tests.http.guarded_app import Observed, make_app
from tests.http.support import Answer, bearer, call, http_scope, make_guard, seed
from tests.support.guards import cut_off, freshness_of, prepare
from tests.support.uvicorn_process import HttpParser, UvicornProcess
from tfm_guard import APIKeyMiddleware
from tfm_guard.bearer import read_token


class Expected(NamedTuple):
    """An answer: its *status*, and the code and the challenge of a refusal."""

    status: int
    code: str | None = None
    challenge: str | None = None


ACCEPTED: Final = Expected(200)
EXEMPT: Final = Expected(200)
SWITCHED: Final = Expected(101)
MISSING: Final = Expected(401, "missing_credentials", 'Bearer realm="api"')
MALFORMED: Final = Expected(400, "invalid_request", 'Bearer realm="api", error="invalid_request"')
INVALID: Final = Expected(401, "invalid_token", 'Bearer realm="api", error="invalid_token"')
UNSCOPED: Final = Expected(
    403, "insufficient_scope", 'Bearer realm="api", error="insufficient_scope", scope="send"'
)
# 400 or 431, or the connection closed in the middle of the request, which may lose that answer.
BY_SERVER: Final = Expected(0)
# The same, or the guard's own 400: h11 counts what has arrived before the end of the headers has.
TOO_LONG: Final = Expected(431)

WIRES: Final = ("httptools", "h11")
EVERYWHERE: Final = (*WIRES, "direct")


class Case(NamedTuple):
    """One request: its *headers* as they are sent, and the answer *expected* to it.

    *but* holds the answers where they differ, *queries* how often the database is asked where
    nothing is remembered, and *on* where the request is possible. `<good>` and the like stand for
    tokens.
    """

    id: str
    headers: bytes
    expected: Expected
    queries: int = 0
    line: bytes = b"GET /v1/x HTTP/1.1"
    host: bytes = b"host: a\r\nconnection: close\r\n"
    body: bytes = b""
    but: Mapping[str, Expected] = MappingProxyType({})
    on: tuple[str, ...] = EVERYWHERE


A: Final = b"authorization: "
OK: Final = A + b"Bearer <good>"
UPGRADE: Final = (
    b"upgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="
)
NO_HOST: Final = b"connection: close\r\n"
SMUGGLED: Final = b"0\r\n\r\nGET /v1/smuggled HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
ONLY_H11: Final = {"httptools": BY_SERVER}
ONLY_HTTPTOOLS: Final = {"h11": BY_SERVER}
MAYBE_HTTPTOOLS: Final = {"h11": TOO_LONG}
ONLY_DIRECT: Final = {"httptools": BY_SERVER, "h11": BY_SERVER}


def path(name: str, target: bytes, **answers: Expected) -> Case:
    """Return the case of a GET without a key of *target*, which is not exempt."""
    return Case(f"path-{name}", b"", MISSING, line=b"GET " + target + b" HTTP/1.1", but=answers)


def token(
    name: str, value: bytes, queries: int = 0, *, but: Mapping[str, Expected] = MappingProxyType({})
) -> Case:
    """Return the case of a token that is refused as all others are."""
    return Case(f"token-{name}", A + b"Bearer " + value, INVALID, queries, but=but)


# fmt: off
CASES: Final = [
    Case("no-authorization", b"", MISSING),
    Case("empty", A, MISSING),
    Case("only-spaces", A + b"   ", MISSING),
    Case("basic", A + b"Basic dXNlcjpw", MISSING),
    Case("digest", A + b'Digest username="u"', MISSING),
    Case("scheme-token", A + b"Token x", MISSING),
    Case("nothing-after-the-scheme", A + b"Bearer", MALFORMED),
    Case("space-after-the-scheme", A + b"Bearer ", MALFORMED),
    Case("good", OK, ACCEPTED, 1),
    Case("scheme-in-lower-case", A + b"bearer <good>", ACCEPTED, 1),
    Case("scheme-in-upper-case", A + b"BEARER <good>", ACCEPTED, 1),
    Case("scheme-in-mixed-case", A + b"bEaReR <good>", ACCEPTED, 1),
    Case("several-spaces", A + b"Bearer   <good>", ACCEPTED, 1),
    Case("tab-between", A + b"Bearer\t<good>", MALFORMED),
    Case("blanks-before", A + b" \tBearer <good>", ACCEPTED, 1),
    Case("blanks-after", A + b"Bearer <good> \t ", ACCEPTED, 1),
    token("then-0xa0", b"<good>\xa0"),
    token("then-0x85", b"<good>\x85"),
    token("then-0x1c", b"<good>\x1c", but=ONLY_H11),
    Case("0xa0-between", A + b"Bearer\xa0<good>", MISSING),
    token("then-nul", b"<good>\0", but=ONLY_DIRECT),
    token("then-0x01", b"<good>\x01", but=ONLY_H11),
    token("then-0x7f", b"<good>\x7f", but=ONLY_H11),
    token("then-vertical-tab", b"<good>\x0b", but=ONLY_DIRECT),
    token("then-carriage-return", b"<good>\r", but=ONLY_DIRECT),
    token("carriage-return-inside", b"tfm_k_\r<good>", but=ONLY_DIRECT),
    token("latin-1", b"\xff\xfe\xe9"),
    token("utf-8", "é中".encode()),
    token("full-width", "ｔｆｍ_ｋ_".encode() + b"<good>"),  # noqa: RUF001
    token("kelvin-sign", "tfm_\u212a_".encode() + b"<good>"),
    token("cyrillic-letter", "tfm_k_\u0430".encode() + b"<good>"),
    token("then-line-feed", b"<good>\n")._replace(on=("direct",)),
    Case("folded-line", A + b"Bearer\r\n <good>", ACCEPTED, 1,
         but={"httptools": BY_SERVER}, on=WIRES),
    Case("two-lines", OK + b"\r\n" + OK, MALFORMED),
    Case("two-lines-one-basic", OK + b"\r\n" + A + b"Basic dXNlcjpw", MALFORMED),
    Case("two-lines-one-empty", OK + b"\r\n" + A, MALFORMED),
    Case("two-in-one-line", A + b"Bearer <good>, Bearer <good>", MALFORMED),
    Case("parameter-after", A + b"Bearer <good>,x=y", MALFORMED),
    Case("two-tokens", A + b"Bearer <good> <good>", MALFORMED),
    token("quoted", b'"<good>"'),
    token("named", b"token=<good>"),
    Case("no-scheme", A + b"<good>", MISSING),
    Case("blank-before-colon", b"authorization : Bearer <good>", MISSING, but=ONLY_DIRECT),
    Case("underscore", b"authorization_: Bearer <good>", MISSING),
    Case("x-api-key", b"x-api-key: <good>", MISSING),
    Case("proxy-authorization", b"proxy-authorization: Bearer <good>", MISSING),
    Case("in-query", b"", MISSING, line=b"GET /v1/x?access_token=<good> HTTP/1.1"),
    Case("in-query-api-key", b"", MISSING, line=b"GET /v1/x?api_key=<good> HTTP/1.1"),
    Case("in-cookie", b"cookie: access_token=<good>", MISSING),
    Case("in-form", b"content-type: application/x-www-form-urlencoded\r\ncontent-length: 67",
         MISSING, line=b"POST /v1/x HTTP/1.1", body=b"access_token=<good>"),
    Case("in-query-too", OK, ACCEPTED, 1, line=b"GET /v1/x?access_token=<other> HTTP/1.1"),
    Case("bad-with-good-in-query", A + b"Bearer <other>", INVALID,
         line=b"GET /v1/x?access_token=<good> HTTP/1.1"),
    token("short", b"<short>"),
    token("long", b"<good>0"),
    token("flipped", b"<flipped>"),
    token("unknown-prefix", b"<unknown>", 1),
    token("wrong-secret", b"<wrong>", 1),
    token("revoked", b"<revoked>", 1),
    token("expired", b"<expired>", 1),
    token("suspended", b"<suspended>", 1),
    token("upper-case-mark", b"TFM_K_<hex>"),
    token("upper-case-k", b"tfm_K_<hex>"),
    token("hyphens", b"tfm-k-<hex>"),
    token("upper-case-hex", b"tfm_k_<HEX>"),
    token("untagged-32", b"tfm_k_" + b"0" * 32),
    token("untagged-40", b"tfm_k_" + b"0" * 40),
    token("another-mark", b"tfm_p_<hex>"),
    token("github", b"ghp_16C7e42F292c6912E7710c838347Ae178B4a"),
    token("payments", b"sk_live_4eC39HqLyjWDarjtT1zdp7dc"),
    token("8-kb", b"a" * 8_192),
    Case("70-kb", A + b"Bearer " + b"a" * 70_000, MALFORMED, but=MAYBE_HTTPTOOLS),
    Case("300-kb", A + b"Bearer " + b"a" * 300_000, MALFORMED, but=MAYBE_HTTPTOOLS),
    Case("2000-headers-then-a-key", b"a: b\r\n" * 2_000 + OK, ACCEPTED, 1),
    token("sql-or", b"' OR '1'='1"),
    token("sql-sleep", b"'; SELECT pg_sleep(5)--"),
    token("operator", b'{"$ne":1}'),
    token("glob", b"*"),
    token("parent-folders", b"../../x"),
    token("format", b"%s%n"),
    token("lookup", b"${jndi:ldap://a}"),
    token("crlf-command", b"*\r\ndel x", but=ONLY_DIRECT)._replace(on=WIRES),
    token("hash-tag", b"tfm_k_{a}"),
    Case("scope-missing", A + b"Bearer <unscoped>", UNSCOPED, 1, line=b"GET /scoped HTTP/1.1"),
    Case("scope-unknown-in-row", A + b"Bearer <strange>", UNSCOPED, 1,
         line=b"GET /scoped HTTP/1.1"),
    Case("scope-held", OK, ACCEPTED, 1, line=b"GET /scoped HTTP/1.1"),
    Case("head", A + b"Bearer <wrong>", INVALID, 1, line=b"HEAD /v1/x HTTP/1.1"),
    Case("head-of-exempt-path", b"", EXEMPT, line=b"HEAD /health HTTP/1.1", on=WIRES),
    Case("method-get-in-lower-case", b"", MISSING, line=b"get /v1/x HTTP/1.1", but=ONLY_H11),
    Case("method-unknown", b"", MISSING, line=b"FOO /v1/x HTTP/1.1", but=ONLY_H11),
    Case("method-connect", b"", MISSING, line=b"CONNECT a:1 HTTP/1.1", but=ONLY_H11),
    Case("method-override", b"x-http-method-override: OPTIONS", MISSING),
    Case("options", b"", MISSING, line=b"OPTIONS /v1/x HTTP/1.1"),
    Case("preflight", b"origin: https://a.example\r\naccess-control-request-method: POST",
         MISSING, line=b"OPTIONS /v1/x HTTP/1.1"),
    Case("websocket", UPGRADE, MISSING, host=b"host: a\r\n", on=WIRES),
    Case("websocket-bad-token", UPGRADE + b"\r\n" + A + b"Bearer <wrong>", INVALID, 1,
         host=b"host: a\r\n", on=WIRES),
    Case("websocket-good", UPGRADE + b"\r\n" + OK, SWITCHED, 1, host=b"host: a\r\n", on=WIRES),
    Case("websocket-in-subprotocol", UPGRADE + b"\r\nsec-websocket-protocol: <good>", MISSING,
         host=b"host: a\r\n", on=WIRES),
    Case("websocket-in-query", UPGRADE, MISSING, host=b"host: a\r\n", on=WIRES,
         line=b"GET /v1/x?access_token=<good> HTTP/1.1"),
    Case("exempt", b"", EXEMPT, line=b"GET /health HTTP/1.1"),
    Case("exempt-with-bad-token", A + b"Bearer <wrong>", EXEMPT, line=b"GET /health HTTP/1.1"),
    Case("exempt-with-query", b"", EXEMPT, line=b"GET /health?a=/v1/x HTTP/1.1"),
    Case("host-with-exempt-path", b"", MISSING, host=b"host: x/health?\r\nconnection: close\r\n"),
    Case("host-with-fragment", b"", MISSING, host=b"host: x#\r\nconnection: close\r\n"),
    Case("host-with-user", b"", MISSING, host=b"host: a@b/health#\r\nconnection: close\r\n"),
    path("two-slashes", b"//v1/x"),
    path("two-slashes-host", b"//evil/health"),
    path("three-slashes", b"///health"),
    path("slash-after", b"/health/"),
    path("dot-after", b"/health."),
    path("upper-case", b"/HEALTH"),
    path("parameter", b"/health;x"),
    path("nul", b"/health%00"),
    path("backslashes", b"/health\\..\\v1"),
    path("dots", b"/health/../v1/x"),
    path("dots-encoded-slashes", b"/health%2F..%2Fv1/x"),
    path("encoded-dots", b"/health/%2e%2e/v1/x"),
    path("encoded-question-mark", b"/health%3F/v1"),
    path("encoded-fragment", b"/health%23/v1"),
    # httptools cuts the fragment off: what is left is the exempt path, for the router as well.
    path("fragment", b"/health#/v1", httptools=EXEMPT),
    path("line-feed", b"/health%0a"),
    path("blank", b"/health%20"),
    path("encoded-twice", b"/%2561dmin"),
    path("exempt-encoded-twice", b"/%2568ealth"),
    path("overlong-utf-8", b"/%c0%af"),
    path("not-hex", b"/%zz"),
    path("absolute", b"http://evil/v1/x"),
    path("absolute-exempt", b"http://evil/health", httptools=EXEMPT),
    path("without-slash", b"health", httptools=BY_SERVER),
    Case("path-asterisk", b"", MISSING, line=b"OPTIONS * HTTP/1.1"),
    Case("no-host", OK, ACCEPTED, 1, host=NO_HOST, but=ONLY_HTTPTOOLS),
    Case("no-host-no-key", b"", MISSING, host=NO_HOST, but=ONLY_HTTPTOOLS),
    Case("two-hosts", OK, ACCEPTED, 1, host=b"host: b\r\nhost: a\r\nconnection: close\r\n",
         but=ONLY_HTTPTOOLS),
    Case("http-1.0", OK, ACCEPTED, 1, line=b"GET /v1/x HTTP/1.0"),
    Case("http-1.0-no-key", b"", MISSING, line=b"GET /v1/x HTTP/1.0"),
    Case("http-0.9", b"", MISSING, line=b"GET /v1/x", host=b"", but=ONLY_HTTPTOOLS, on=WIRES),
    Case("two-lengths", OK + b"\r\ntransfer-encoding: chunked\r\ncontent-length: 4", ACCEPTED, 1,
         line=b"POST /v1/x HTTP/1.1", host=b"host: a\r\n", body=SMUGGLED,
         but={"httptools": BY_SERVER}, on=WIRES),
    Case("expects-100", A + b"Bearer <wrong>\r\nexpect: 100-continue\r\n"
         b"content-length: 1073741824", INVALID, 1, line=b"POST /v1/x HTTP/1.1"),
    Case("expects-100-no-key", b"expect: 100-continue\r\ncontent-length: 1073741824", MISSING,
         line=b"POST /v1/x HTTP/1.1"),
    # Servers hand names on in lower case, as the specification of ASGI wants it.
    Case("name-in-upper-case", b"AUTHORIZATION: Bearer <good>", ACCEPTED, 1,
         but={"direct": MISSING}),
    Case("spoofed-key-id", b"x-tfm-key-id: 1\r\nuser: admin\r\nscope: send", MISSING),
    Case("spoofed-key-id-with-key", OK + b"\r\nx-tfm-key-id: 1\r\nscope: api-keys:write",
         ACCEPTED, 1),
]
# fmt: on
BODY: Final = b'{"detail":{"code":"invalid_token","message":"The API key is not valid."}}'

ON_WIRE: Final = [
    pytest.param(server, case, id=f"{case.id}-{server}")
    for server in WIRES
    for case in CASES
    if server in case.on
]
DIRECT: Final = [case for case in CASES if "direct" in case.on]


def filled(text: bytes, tokens: Mapping[str, bytes]) -> bytes:
    """Return *text* with tokens in place of their names."""
    for name, value in tokens.items():
        text = text.replace(b"<%s>" % name.encode(), value)
    return text


def with_variants(tokens: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return *tokens* and what can be made of the good one that is not good any more."""
    good = tokens["good"]
    return {
        **tokens,
        "other": b"tfm_k_" + b"0" * 48,
        "short": good[:-1],
        "flipped": good[:-1] + (b"1" if good.endswith(b"0") else b"0"),
        "hex": good[6:],
        "HEX": good[6:].upper().replace(b"0", b"A"),
    }


class Counts(NamedTuple):
    """How often the protected app was called and the database asked."""

    calls: int
    queries: int


class Server(NamedTuple):
    """A server over real sockets, and the tokens for it."""

    port: int
    tokens: dict[str, bytes]

    async def send(self, request: bytes) -> bytes:
        """Send *request* as it is, and return all that comes back until the connection ends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        answer = b""
        try:
            async with asyncio.timeout(20):
                while received := await reader.read(65_536):
                    answer += received
                    if answer.startswith(b"HTTP/1.1 101"):
                        break
        except ConnectionResetError:
            pass  # what had come before counts
        finally:
            writer.transport.abort()
        return answer

    async def try_case(self, case: Case) -> bytes:
        """Send the request of *case* and return the answer as it came."""
        head = case.line + b"\r\n" + case.host + (case.headers + b"\r\n" if case.headers else b"")
        return await self.send(filled(head + b"\r\n" + case.body, self.tokens))

    async def observed(self) -> Counts:
        """Return what the server has counted so far."""
        answer = read_answer(
            await self.send(b"GET /observed HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        )
        return Counts(*answer.json)


def read_answer(raw: bytes) -> Answer:
    """Read the first answer in *raw*; status 0 where there is none."""
    if not raw:
        return Answer(0, (), b"")
    head, _, rest = raw.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = tuple((name.lower(), value) for name, _, value in (s.partition(b": ") for s in lines))
    length = dict(headers).get(b"content-length", b"0")
    return Answer(int(first.split()[1]), headers, rest[: int(length)])


def check(answer: Answer, expected: Expected, case: Case) -> None:
    """Fail unless *answer* is as *expected*."""
    if expected in (BY_SERVER, TOO_LONG):
        assert answer.status in (0, 400, 431)
        assert expected == TOO_LONG or answer.header("www-authenticate") is None
        return
    assert answer.status == expected.status
    assert answer.header("www-authenticate") == expected.challenge
    if case.line.startswith(b"HEAD"):
        assert answer.body == b""
        assert int(answer.header("content-length") or 0) > 0
    else:
        assert answer.code == expected.code


def reaches_app(expected: Expected) -> bool:
    """Tell whether the protected app may answer."""
    return expected.status in (200, 101)


def queries(expected: Expected, case: Case) -> int:
    """Return how often the database is asked at most: not at all, where no token was found."""
    return case.queries if expected.code != "missing_credentials" and expected.status else 0


class Seeded(NamedTuple):
    """A database, and the tokens for it."""

    url: str
    tokens: dict[str, bytes]


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Seeded:
    """Make one database with keys of every kind for the whole module, which only reads it.

    Its guards may believe what they remember for ever, and ask for changes never.
    """
    url = f"sqlite:///{tmp_path_factory.mktemp('bad_inputs')}/keys.db"
    asyncio.run(prepare(url))
    return Seeded(url, with_variants(asyncio.run(seed(url))))


@pytest.fixture(scope="module")
def servers(seeded: Seeded) -> Iterator[dict[str, Server]]:
    """Run uvicorn with each of its two parsers, for the whole module."""

    def process(http: HttpParser) -> UvicornProcess:
        return UvicornProcess(
            "tests.http.guarded_app:served",
            env={"TFM_GUARD_DATABASE_URL": seeded.url},
            http=http,
            extra_args=("--factory",),
            ready_path="/health",
        )

    with process("httptools") as httptools, process("h11") as h11:
        yield {
            "httptools": Server(httptools.port, seeded.tokens),
            "h11": Server(h11.port, seeded.tokens),
        }


class Direct(NamedTuple):
    """The middleware without a server, and the tokens for it."""

    app: APIKeyMiddleware
    observed: Observed
    tokens: dict[str, bytes]

    def scope(self, case: Case, root_path: str = "") -> Scope:
        """Return the request of *case* as a server would hand it on that lets all bytes pass."""
        method, target, *_ = filled(case.line, self.tokens).decode("latin-1").split(" ")
        sent = filled(case.host + case.headers, self.tokens)
        lines = [line.partition(b": ") for line in sent.split(b"\r\n") if line]
        path, _, query = target.partition("?")
        return http_scope(
            method,
            root_path + unquote(path),
            [(name, value) for name, _, value in lines],
            root_path=root_path,
            query_string=query.encode("latin-1"),
        )


@pytest.fixture
async def direct(seeded: Seeded) -> AsyncIterator[Direct]:
    """Guard an app in this process, which believes nothing that it remembers."""
    observed = Observed()
    async with make_guard(seeded.url) as guard:
        app = make_app(guard, observed)
        await cut_off(guard)
        freshness_of(guard).fresh_until = -math.inf
        observed.queries = 0
        yield Direct(app, observed, seeded.tokens)
    observed.stop()


@pytest.fixture
async def remembering(seeded: Seeded) -> AsyncIterator[Direct]:
    """Guard an app in this process, which remembers what there is to know about every token."""
    observed = Observed()
    async with make_guard(seeded.url) as guard:
        app = make_app(guard, observed)
        for value in seeded.tokens.values():
            await call(app, http_scope(headers=bearer(value)))
        observed.queries = observed.calls = 0
        yield Direct(app, observed, seeded.tokens)
    observed.stop()


@pytest.mark.parametrize(("server", "case"), ON_WIRE)
async def test_over_a_socket(servers: dict[str, Server], server: str, case: Case) -> None:
    """Each request gets its answer, and reaches the app and the database only as it may."""
    expected = case.but.get(server, case.expected)
    before = await servers[server].observed()
    raw = await servers[server].try_case(case)
    check(read_answer(raw), expected, case)
    after = await servers[server].observed()
    assert after.calls - before.calls == reaches_app(expected)
    assert after.queries - before.queries <= queries(expected, case)


async def test_called_directly(direct: Direct, subtests: pytest.Subtests) -> None:
    """The middleware answers alike when no server has looked at the request before."""
    for case in DIRECT:
        with subtests.test(case.id):
            expected = case.but.get("direct", case.expected)
            direct.observed.calls = direct.observed.queries = 0
            check(await call(direct.app, direct.scope(case)), expected, case)
            assert direct.observed.calls == reaches_app(expected)
            assert direct.observed.queries == queries(expected, case)


async def test_called_directly_from_memory(remembering: Direct, subtests: pytest.Subtests) -> None:
    """It answers alike from memory; only keys of suspended accounts are never remembered."""
    for case in DIRECT:
        with subtests.test(case.id):
            expected = case.but.get("direct", case.expected)
            remembering.observed.calls = remembering.observed.queries = 0
            check(await call(remembering.app, remembering.scope(case)), expected, case)
            assert remembering.observed.calls == reaches_app(expected)
            assert remembering.observed.queries == (case.id == "token-suspended")


@pytest.mark.parametrize("root_path", ["/v", "/v1", "/health", "/api"])
async def test_under_a_root_path(direct: Direct, root_path: str) -> None:
    """Every path gets the same answer under a root path, even one that other paths begin with."""
    for case in CASES:
        if "direct" in case.on and case.line.split()[1].startswith(b"/"):
            expected = case.but.get("direct", case.expected)
            check(await call(direct.app, direct.scope(case, root_path)), expected, case)


@pytest.mark.parametrize("server", WIRES)
async def test_the_servers_send_one_answer_to_all_bad_tokens(
    servers: dict[str, Server], server: str
) -> None:
    """Unknown, wrong, revoked, expired and mistyped tokens get the same bytes, but for the date."""
    answers = set()
    for case in CASES:
        if case.id.startswith("token-") and server in case.on and server not in case.but:
            head, end, body = (await servers[server].try_case(case)).partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            undated = [line for line in lines if not line.startswith(b"date: ")]
            assert len(undated) == len(lines) - 1
            answers.add(b"\r\n".join(undated) + end + body)
    assert len(answers) == 1
    (answer,) = answers
    assert answer.endswith(BODY)


async def test_the_middleware_sends_one_answer_to_all_bad_tokens(direct: Direct) -> None:
    """Its answers to bad tokens are these bytes and no others."""
    cases = [case for case in CASES if case.id.startswith("token-") and "direct" in case.on]
    answers = {
        await call(direct.app, direct.scope(case))
        for case in cases
        if case.but.get("direct", case.expected) is INVALID
    }
    assert answers == {
        Answer(
            401,
            (
                (b"cache-control", b"no-store"),
                (b"www-authenticate", b'Bearer realm="api", error="invalid_token"'),
                (b"content-length", b"%d" % len(BODY)),
                (b"content-type", b"application/json"),
            ),
            BODY,
        )
    }
    assert len(cases) > 30


async def test_any_character_changed_is_refused_without_a_query(direct: Direct) -> None:
    """A token with one wrong character, wherever it stands, is refused by its form or its tag."""
    good = direct.tokens["good"]
    for position in range(len(good)):
        other = b"1" if good[position : position + 1] == b"0" else b"0"
        changed = good[:position] + other + good[position + 1 :]
        answer = await call(direct.app, http_scope(headers=bearer(changed)))
        assert (answer.status, answer.code) == (401, "invalid_token")
    assert direct.observed.queries == 0
    assert direct.observed.calls == 0


@pytest.mark.parametrize("value", [b"*\r\nDEL x", b"x\r\nauthorization: Bearer <good>"])
async def test_line_breaks_in_a_token_break_nothing(direct: Direct, value: bytes) -> None:
    """A line break that a server let through is part of a token that is no key."""
    headers = bearer(filled(value, direct.tokens))
    answer = await call(direct.app, http_scope(headers=headers))
    assert (answer.status, answer.code) == (401, "invalid_token")
    assert direct.observed.queries == 0


@pytest.mark.parametrize("server", WIRES)
async def test_a_body_is_not_asked_for(servers: dict[str, Server], server: str) -> None:
    """A client that waits to be told to send its body is refused, and told nothing before."""
    (case,) = (case for case in CASES if case.id == "expects-100")
    raw = await servers[server].try_case(case)
    assert raw.startswith(b"HTTP/1.1 401")
    assert raw.count(b"HTTP/1.1") == 1


async def test_a_refusal_reads_no_body(direct: Direct) -> None:
    """Refusing never calls *receive*, however long the body is said to be."""
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the body was read")

    async def send(message: Message) -> None:
        sent.append(message)

    (case,) = (case for case in CASES if case.id == "expects-100")
    await direct.app(direct.scope(case), receive, send)
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("server", WIRES)
async def test_a_smuggled_request_is_not_let_in_by_the_key_before_it(
    servers: dict[str, Server], server: str
) -> None:
    """What follows a request with two lengths is refused, or asked for a key of its own."""
    (case,) = (case for case in CASES if case.id == "two-lengths")
    raw = await servers[server].try_case(case)
    if server == "httptools":
        assert raw.startswith(b"HTTP/1.1 400")
        assert raw.count(b"HTTP/1.1") == 1
        return
    _, first, second = raw.split(b"HTTP/1.1 ")
    assert first.startswith(b"200")
    assert second.startswith(b"401")


@pytest.mark.parametrize("size", [70_000, 300_000])
async def test_no_copy_of_a_long_header_is_kept(direct: Direct, size: int) -> None:
    """After a long header was refused, nothing of it is left in memory."""
    await call(direct.app, http_scope(headers=bearer(b"a" * size)))
    tracemalloc.start()
    try:
        answer = await call(direct.app, http_scope(headers=bearer(b"a" * size)))
        left, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer.status == 400
    assert left < size / 2
    assert most > size  # so that this test would see a copy


@pytest.mark.alone
def test_many_headers_are_read_in_no_time() -> None:
    """Finding the key behind 2000 other headers takes less than a millisecond."""
    headers = [(b"a", b"b")] * 2_000 + bearer("x")
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        assert read_token(headers) == b"x"
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.001
