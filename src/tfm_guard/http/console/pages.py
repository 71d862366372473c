"""Pages as HTML, and what they are allowed to do in a browser."""

import random
from collections.abc import Mapping
from hashlib import sha256
from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse, Response

from tfm_guard.errors import Refusal
from tfm_guard.http.console.texts import Texts

# Nothing inline, nothing from elsewhere, and in nobody's frame.
_POLICY: Final = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Not "no-referrer": with it, browsers say "Origin: null" of our own forms.
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_RETRY_AFTER_SECONDS: Final = (1, 3)
_KEPT: Final = "public, max-age=31536000, immutable"
_MEDIA_TYPES: Final = {
    "console.css": "text/css; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "console.svg": "image/svg+xml",
}


class Pages:
    """Renders templates with *texts*, and serves the files that they name."""

    def __init__(self, texts: Texts) -> None:
        folder = files(__package__) / "static"
        self._files = {name: (folder / name).read_bytes() for name in _MEDIA_TYPES}
        # In their addresses, so that browsers may keep them for as long as they are these.
        version = sha256(b"".join(self._files.values())).hexdigest()[:12]
        self._texts = texts
        self._templates = Environment(
            loader=PackageLoader("tfm_guard.http.console"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["fill"] = fill
        self._templates.globals.update(t=texts, version=version, bdi=bdi)

    def render(self, template: str, *, base: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Return a page; *base* leads from its address to that of the list."""
        content = self._templates.get_template(template).render(base=base, **values)
        return HTMLResponse(content, status)

    def refuse(self, refusal: Refusal, *, base: str) -> HTMLResponse:
        """Return the page that says what was refused, and why."""
        title = self._texts.refusal_titles.get(refusal.status, refusal.code)
        response = self.render(
            "refusal.html",
            base=base,
            status=refusal.status,
            title=title,
            message=self._texts.refusal(refusal),
        )
        if refusal.retryable:
            seconds = random.randint(*_RETRY_AFTER_SECONDS)  # noqa: S311  # no secret
            response.headers["retry-after"] = str(seconds)
        return response

    def file(self, name: str) -> Response | None:
        """Return one of the files that pages name, if it is one."""
        content = self._files.get(name)
        if content is None:
            return None
        return Response(content, headers={"cache-control": _KEPT}, media_type=_MEDIA_TYPES[name])


def fill(text: str, **values: Any) -> Markup:
    """Put *values* into the braces of *text*; neither can become markup."""
    return escape(text).format(**values)


def bdi(text: str) -> Markup:
    """Return *text* so that its direction does not change how what is around it reads."""
    return Markup("<bdi>{}</bdi>").format(text)
