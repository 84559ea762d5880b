"""The rate-limit headers, to the letter (draft-ietf-httpapi-ratelimit-headers-10)."""

from app.limits.headers import rate_limit_headers
from app.store import Rate, RateState


def test_the_contracts_example() -> None:
    minute, day = Rate("a", 5, 60), Rate("b", 50, 86400)

    headers = rate_limit_headers(
        [("user-day", day, RateState(49, 86399.2, 0)), ("user-minute", minute, RateState(4, 59.1, 0))]
    )

    assert headers["RateLimit"] == '"user-minute";r=4;t=60, "user-day";r=49;t=86400'
    assert '"user-minute";q=5;w=60' in headers["RateLimit-Policy"].split(", ")
    assert '"user-day";q=50;w=86400' in headers["RateLimit-Policy"].split(", ")


def test_of_two_used_up_the_longer_wait_comes_first() -> None:
    minute, day = Rate("a", 5, 60), Rate("b", 50, 86400)

    headers = rate_limit_headers([("m", minute, RateState(0, 12.0, 0)), ("d", day, RateState(0, 900.0, 0))])

    assert headers["RateLimit"] == '"d";r=0;t=900, "m";r=0;t=12'


def test_seconds_are_whole_and_never_too_few() -> None:
    headers = rate_limit_headers([("m", Rate("a", 5, 60), RateState(0, 0.001, 0))])

    assert headers["RateLimit"] == '"m";r=0;t=1'
