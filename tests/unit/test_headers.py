"""The rate-limit headers, to the letter (draft-ietf-httpapi-ratelimit-headers-10)."""

from app.limits.headers import policy_header, rate_limit_headers
from app.store import Rate, RateState


def test_the_contracts_example() -> None:
    policy = policy_header([("user-minute", Rate("a", 5, 60)), ("user-day", Rate("b", 50, 86400))])

    headers = rate_limit_headers(
        policy, [("user-day", RateState(49, 86399.2, 0)), ("user-minute", RateState(4, 59.1, 0))]
    )

    assert headers == {
        "RateLimit-Policy": '"user-minute";q=5;w=60, "user-day";q=50;w=86400',
        "RateLimit": '"user-minute";r=4;t=60, "user-day";r=49;t=86400',
    }


def test_of_two_used_up_the_longer_wait_comes_first() -> None:
    headers = rate_limit_headers("", [("m", RateState(0, 12.0, 0)), ("d", RateState(0, 900.0, 0))])

    assert headers["RateLimit"] == '"d";r=0;t=900, "m";r=0;t=12'


def test_seconds_are_whole_and_never_too_few() -> None:
    headers = rate_limit_headers("", [("m", RateState(0, 0.001, 0))])

    assert headers["RateLimit"] == '"m";r=0;t=1'
