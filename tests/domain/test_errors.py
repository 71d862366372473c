"""Facts about the errors and the answers they stand for."""

import pytest

from tfm_guard import errors
from tfm_guard.errors import (
    AlreadyReplaced,
    ConfigurationError,
    GuardError,
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
    SchemaError,
    Unavailable,
)

# code, status, RFC 6750 error, challenged, retryable
ANSWERS: dict[Refusal, tuple[str, int, str | None, bool, bool]] = {
    MissingCredentials(): ("missing_credentials", 401, None, True, False),
    InvalidRequest(): ("invalid_request", 400, "invalid_request", True, False),
    InvalidToken("expired"): ("invalid_token", 401, "invalid_token", True, False),
    InsufficientScope(frozenset({"send"})): (
        *("insufficient_scope", 403, "insufficient_scope", True, False),
    ),
    Unavailable("database"): ("unavailable", 503, None, False, True),
    NotConfirmed(): ("unconfirmed", 503, None, False, True),
    AlreadyReplaced("one at a time"): ("already_replaced", 409, None, False, False),
    NotAllowed(): ("not_allowed", 403, None, False, False),
    PlanLimitReached(plan="free", limit=2, current=2): (
        *("plan_limit_reached", 403, None, False, False),
    ),
    KeyNotFound(): ("not_found", 404, None, False, False),
    InvalidInput(("name",), "string_too_long", "Too long"): (
        *("invalid_input", 422, None, False, False),
    ),
}


@pytest.mark.parametrize("error", ANSWERS, ids=lambda error: error.code)
def test_each_refusal_has_its_answer(error: Refusal) -> None:
    """Code, status, RFC 6750 error, challenge and Retry-After belong to the class."""
    answer = (error.code, error.status, error.bearer_error, error.challenged, error.retryable)
    assert answer == ANSWERS[error]


def test_every_refusal_is_in_the_table() -> None:
    """No refusal was left out above, and each has a code of its own."""
    refusals = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Refusal) and value is not Refusal
    }
    assert {type(error) for error in ANSWERS} == refusals
    assert len({error.code for error in ANSWERS}) == len(ANSWERS)


def test_all_errors_are_of_one_tree() -> None:
    """Everything raised on purpose can be caught as GuardError."""
    for kind in (Refusal, ConfigurationError, SchemaError):
        assert issubclass(kind, GuardError)


@pytest.mark.parametrize("reason", ["unknown prefix", "wrong secret", "revoked", "expired"])
def test_one_message_for_every_bad_token(reason: str) -> None:
    """What is sent does not depend on the reason, which is seen in the repr alone."""
    error = InvalidToken(reason)
    assert error.message == str(error) == InvalidToken("another").message
    assert reason not in error.message
    assert repr(error) == f"InvalidToken(reason={reason!r})"
    assert error.args == ()


def test_a_refusal_without_a_reason_has_its_code() -> None:
    """The logs always have something to say."""
    assert KeyNotFound().reason == "not_found"
    assert MissingCredentials(reason="another scheme").reason == "another scheme"


def test_errors_carry_their_evidence() -> None:
    """Plan limits and missing scopes can be read from the error, and are told in its message."""
    limit = PlanLimitReached(plan="pro", limit=15, current=17)
    assert (limit.plan, limit.limit, limit.current) == ("pro", 15, 17)
    assert "'pro' allows 15 active API keys; this account has 17" in limit.message
    scope = InsufficientScope(frozenset({"send", "domains:write"}))
    assert scope.missing == {"send", "domains:write"}
    assert scope.message.endswith("domains:write send")


def test_a_configuration_error_lists_its_faults() -> None:
    """All faults are there one by one, and all in the message."""
    error = ConfigurationError("one is wrong", "two as well")
    assert error.faults == ("one is wrong", "two as well")
    assert str(error) == "one is wrong; two as well"
