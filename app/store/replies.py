"""The meaning of a server's refusal: the wrong server, a missing right, or a failure."""

import re

from redis.exceptions import RedisError, ResponseError

_ELSEWHERE = {"READONLY", "MOVED", "MASTERDOWN", "CLUSTERDOWN", "NOREPLICAS", "LOADING"}

# Redis 6 wraps a refusal inside a script: "Error running script (call to f_…): @user_script:5: -READONLY You can't …".
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -?([A-Z]+) ")
# A script's command that the user may not run, as Redis 7 and Redis 6 say it.
_REFUSED_IN_SCRIPT = re.compile(r"ACL failure in script|executing the script can't")


class Elsewhere(RedisError):
    """This server is not the one to ask, or not yet. It did not run the command, so that may be sent again."""


def reason_of(error: Exception) -> str:
    """Return a short name for an error, without addresses: redis-py's, else the refusal's first word."""
    code = _code_of(error)
    return code if type(error) is ResponseError and code else type(error).__name__


def elsewhere(error: Exception) -> Elsewhere | None:
    """Return the error as `Elsewhere` if it means: this is the wrong server."""
    if isinstance(error, Elsewhere):
        return error
    return Elsewhere(reason_of(error)) if isinstance(error, RedisError) and _code_of(error) in _ELSEWHERE else None


def is_refused_right(error: Exception) -> bool:
    """Return whether the user lacks a right for this command; the server itself works."""
    refused = isinstance(error, ResponseError)
    return refused and (_code_of(error) == "NOPERM" or _REFUSED_IN_SCRIPT.search(str(error)) is not None)


def is_unknown_command(error: ResponseError) -> bool:
    """Return whether the server is too old for this command."""
    return "unknown command" in str(error).lower()


def _code_of(error: Exception) -> str:
    """Return a refusal's first word, such as READONLY, or nothing."""
    text = str(error)
    if found := _IN_SCRIPT.search(text):
        return found[1]
    # redis-py cuts the word off for the refusals it knows, and keeps it aside.
    code: str = getattr(error, "status_code", None) or text.partition(" ")[0]
    return code if code.isupper() and code != "ERR" else ""
