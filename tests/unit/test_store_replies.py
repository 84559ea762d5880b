"""What a server's refusals mean, as Redis 6, Redis 7 and Valkey word them."""

import pytest
from redis._parsers.base import BaseParser
from redis.exceptions import ResponseError

from app.store.replies import elsewhere, is_refused_right, is_unknown_command, reason_of

IN_SCRIPT = "ERR Error running script (call to f_6b1bf486c81ceb7edf3c093f4c48582e38c0e791): @user_script:5: -"

ELSEWHERE = {
    "READONLY You can't write against a read only replica.": "ReadOnlyError",
    "READONLY You can't write against a read only replica. script: 6b1b, on @user_script:5.": "ReadOnlyError",
    f"{IN_SCRIPT}READONLY You can't write against a read only replica. ": "READONLY",
    "MOVED 3999 127.0.0.1:6381": "MovedError",
    "LOADING Redis is loading the dataset in memory": "BusyLoadingError",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": "MasterDownError",
    "CLUSTERDOWN The cluster is down": "ClusterDownError",
    "CLUSTERDOWN Hash slot not served": "ClusterDownError",
    "NOREPLICAS Not enough good replicas to write.": "NOREPLICAS",
}
HERE = {
    "OOM command not allowed when used memory > 'maxmemory'.": "OutOfMemoryError",
    f"{IN_SCRIPT}OOM command not allowed when used memory > 'maxmemory'. ": "OOM",
    "MISCONF Errors writing to the AOF file: No space left on device": "MISCONF",
    "BUSY Redis is busy running a script.": "BUSY",
    "ASK 3999 127.0.0.1:6381": "AskError",
    "TRYAGAIN Multiple keys request during rehashing of slot": "TryAgainError",
    "CROSSSLOT Keys in request don't hash to the same slot": "ClusterCrossSlotError",
    "NOAUTH Authentication required.": "AuthenticationError",
    "WRONGPASS invalid username-password pair or user is disabled.": "AuthenticationError",
    "ERR unknown command 'SPUBLISH', with args beginning with: 'c'": "ResponseError",
    "ERR Protocol error: unauthenticated multibulk length": "ResponseError",
}
REFUSED = (
    "NOPERM User broker has no permissions to run the 'publish' command",
    "NOPERM No permissions to access a channel",
    "ERR ACL failure in script: User broker has no permissions to run the 'zadd' command, on @user_script:5.",
    f"{IN_SCRIPT}NOPERM The user executing the script can't run this command or subcommand ",
)


def parsed(text: str) -> Exception:
    """As redis-py gives it to us."""
    error: Exception = BaseParser.parse_error(text)  # type: ignore[no-untyped-call]  # redis-py has not typed it
    return error


@pytest.mark.parametrize(("text", "reason"), ELSEWHERE.items())
def test_not_me(text: str, reason: str) -> None:
    found = elsewhere(parsed(text))
    assert found is not None
    assert str(found) == reason
    assert elsewhere(found) is found


@pytest.mark.parametrize(("text", "reason"), HERE.items())
def test_here_but_not_now(text: str, reason: str) -> None:
    error = parsed(text)
    assert elsewhere(error) is None
    assert not is_refused_right(error)
    assert reason_of(error) == reason


@pytest.mark.parametrize("text", REFUSED)
def test_not_you(text: str) -> None:
    assert is_refused_right(parsed(text))
    assert elsewhere(parsed(text)) is None


def test_other_errors() -> None:
    assert reason_of(ConnectionResetError("Connection reset by peer 10.0.0.1")) == "ConnectionResetError"
    assert elsewhere(ConnectionResetError("READONLY")) is None
    assert is_unknown_command(ResponseError("unknown command `SSUBSCRIBE`, with args beginning with: `c`, "))
    assert not is_unknown_command(ResponseError("wrong number of arguments"))
