"""Facts about what is told of Redis's errors."""

import pytest
from redis.exceptions import ResponseError

from tfm_guard.redis_access import describe


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ResponseError("unknown command 'AUTH', with args beginning with: 'bob' 'hunter2' "),
            "ResponseError: unknown command 'AUTH'",
        ),
        (TimeoutError(), "TimeoutError"),
        (ConnectionError("refused\nby the server"), "ConnectionError: refused"),
    ],
)
def test_an_error_is_told_without_what_was_sent(error: Exception, words: str) -> None:
    """It is its kind and its first line, without the arguments that a server quotes."""
    assert describe(error) == words
