"""Every error of this library: one tree, whose HTTP-facing members know their own answer.

`Refusal` is what a client may be told. Its class fixes the wire code, the HTTP status and the
RFC 6750 error; its `reason` says why in the logs and is never sent.
"""

from typing import ClassVar


class GuardError(Exception):
    """Anything this library raises on purpose."""


class ConfigurationError(GuardError):
    """The settings cannot work; *faults* lists everything that is wrong with them, at once."""

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        super().__init__("; ".join(faults))


class SchemaError(GuardError):
    """The database's tables do not fit this release; the message says what to do."""


class Refusal(GuardError):
    """An answer to a client: *message* may be sent, *reason* is for the logs alone."""

    code: ClassVar[str]
    status: ClassVar[int]
    # The `error` attribute of RFC 6750 section 3.1, where the refusal is about credentials.
    bearer_error: ClassVar[str | None] = None
    # Whether RFC 9110 section 11.6.1 wants a WWW-Authenticate field with it.
    challenged: ClassVar[bool] = False
    # Whether the same request may succeed in a moment, so that the answer carries Retry-After.
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        self.message = message
        self.reason = reason or self.code
        super().__init__(message)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(reason={self.reason!r})"


class MissingCredentials(Refusal):
    """No credentials came, or none of a scheme known here (RFC 6750 section 3: no error code)."""

    code = "missing_credentials"
    status = 401
    challenged = True

    def __init__(self, *, reason: str | None = None) -> None:
        super().__init__(
            "This request needs an API key. Send it as: Authorization: Bearer <key>", reason=reason
        )


class InvalidRequest(Refusal):
    """The Authorization field cannot be read as one Bearer token."""

    code = "invalid_request"
    status = 400
    bearer_error = "invalid_request"
    challenged = True

    def __init__(self, *, reason: str | None = None) -> None:
        super().__init__(
            "The Authorization header must be one line with one token: Bearer <key>", reason=reason
        )


class InvalidToken(Refusal):
    """The token proves no active key.

    The answer is one and the same for unknown, wrong, revoked and expired keys, so that nobody can
    tell them apart; *reason* can.
    """

    code = "invalid_token"
    status = 401
    bearer_error = "invalid_token"
    challenged = True
    message = "The API key is not valid."

    def __init__(self, reason: str) -> None:
        # Not by way of the classes above: a flood of wrong tokens makes a great many of these.
        self.reason = reason
        self.args = ()  # else the reason, which nobody outside may learn

    def __str__(self) -> str:
        return self.message


class InsufficientScope(Refusal):
    """The key is good but lacks *missing* (never empty)."""

    code = "insufficient_scope"
    status = 403
    bearer_error = "insufficient_scope"
    challenged = True

    def __init__(self, missing: frozenset[str]) -> None:
        self.missing = missing
        super().__init__(f"This key lacks the scope: {' '.join(sorted(missing))}")


class Unavailable(Refusal):
    """The answer cannot be known now: neither yes nor no. Asking again later may help."""

    code = "unavailable"
    status = 503
    retryable = True

    def __init__(self, reason: str) -> None:
        super().__init__("The request could not be checked now. Try again.", reason=reason)


class NotConfirmed(Refusal):
    """The change is made and is still being pushed, but some process may not know of it yet.

    The same request joins the wait.
    """

    code = "unconfirmed"
    status = 503
    retryable = True

    def __init__(self) -> None:
        super().__init__(
            "The change is made, but it is not yet sure that it is in force everywhere. "
            "Send the request again to wait for that."
        )


class PlanLimitReached(Refusal):
    """The account already holds *current* of the *limit* active keys that *plan* allows."""

    code = "plan_limit_reached"
    status = 403

    def __init__(self, *, plan: str, limit: int, current: int) -> None:
        self.plan = plan
        self.limit = limit
        self.current = current
        super().__init__(
            f"The plan {plan!r} allows {limit} active API key{'' if limit == 1 else 's'}; "
            f"this account has {current}. "
            "Delete one or choose a larger plan."
        )


class AlreadyReplaced(Refusal):
    """The key, or the one that it replaced, is in its grace: one predecessor at a time."""

    code = "already_replaced"
    status = 409

    def __init__(self, message: str) -> None:
        super().__init__(message)


class AccountNotFound(GuardError):
    """Nobody has ever mentioned such an account."""

    def __init__(self, account_id: str) -> None:
        super().__init__(f"There is no account {account_id!r}.")


class NotAllowed(Refusal):
    """Who is signed in may look, but not change anything."""

    code = "not_allowed"
    status = 403

    def __init__(self) -> None:
        super().__init__("You may see the API keys of this account, but not change them.")


class KeyNotFound(Refusal):
    """The account has no such key, or not any more."""

    code = "not_found"
    status = 404

    def __init__(self) -> None:
        super().__init__("There is no such API key.")


class InvalidInput(Refusal):
    """A value given to create or change something is not acceptable.

    *field* is where it stands, outermost first: the argument's name, and a position within a list;
    *kind* is a short machine-readable name for what is wrong.
    """

    code = "invalid_input"
    status = 422

    def __init__(self, field: tuple[str | int, ...], kind: str, message: str) -> None:
        self.field = field
        self.kind = kind
        super().__init__(message)
