"""POST /session: what each failure of OneInbox becomes, and whether it counts."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from tests.conftest import Logs, OpenBroker
from tests.support.harness import AGENT_ID, API_KEY, TOKEN, Upstream, post_session, started, without
from tests.support.shapes import assert_problem, assert_session, remaining


def rejected(*locs: Any) -> dict[str, Any]:
    """FastAPI's 422, about these places."""
    return {"detail": [{"loc": loc, "msg": "too odd", "type": "odd", "input": "echo", "ctx": {"a": 1}} for loc in locs]}


STATUSES: dict[str, tuple[int, str]] = {
    "400": (400, "upstream-error"),
    "401": (401, "upstream-misconfigured"),
    "402": (402, "upstream-misconfigured"),
    "403": (403, "upstream-misconfigured"),
    "404": (404, "upstream-misconfigured"),
    "409": (409, "upstream-error"),
    "413": (413, "upstream-error"),
    "418": (418, "upstream-error"),
    "422": (422, "upstream-misconfigured"),
}
LOST_STATUSES: dict[str, tuple[int, str]] = {
    "301": (301, "upstream-error"),
    "302": (302, "upstream-error"),
    "303": (303, "upstream-error"),
    "307": (307, "upstream-error"),
    "308": (308, "upstream-error"),
    "408": (408, "upstream-error"),
    "500": (500, "upstream-error"),
    "502": (502, "upstream-error"),
    "503": (503, "upstream-error"),
    "504": (504, "upstream-error"),
    "599": (599, "upstream-error"),
    # A success, but no session.
    "202": (202, "upstream-invalid"),
    "204": (204, "upstream-invalid"),
}


async def respond_and_ask(upstream: Upstream, broker: httpx.AsyncClient, status: int) -> httpx.Response:
    upstream.start.respond(
        status,
        json={"detail": f"Bearer {API_KEY} is bad, says {AGENT_ID}"},
        headers={"Location": "https://elsewhere.example/v1/calls/web", "Retry-After": "9"},
    )
    return await post_session(broker)


@pytest.mark.parametrize(("status", "slug"), STATUSES.values(), ids=STATUSES.keys())
async def test_a_refusal_has_no_detail_and_does_not_count(
    status: int, slug: str, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    response = await respond_and_ask(upstream, broker, status)

    assert_problem(response, slug)
    assert API_KEY not in response.text
    assert AGENT_ID not in response.text
    assert upstream.start.call_count == 1
    upstream.works_again()
    assert remaining(await post_session(broker)) == 4


@pytest.mark.parametrize(("status", "slug"), LOST_STATUSES.values(), ids=LOST_STATUSES.keys())
async def test_a_response_without_a_call_counts(
    status: int, slug: str, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    assert_problem(await respond_and_ask(upstream, broker, status), slug)

    # A POST is sent once, and only to OneInbox.
    assert upstream.start.call_count == 1
    assert {request.url.host for request in upstream.requests} == {"api.oneinbox.ai"}
    upstream.works_again()
    assert remaining(await post_session(broker)) == 3


@pytest.mark.parametrize("status", [401, 402, 403, 404, 422])
async def test_a_misconfiguration_is_logged_as_an_error(
    status: int, broker: httpx.AsyncClient, upstream: Upstream, logs: Logs
) -> None:
    response = await respond_and_ask(upstream, broker, status)

    [error] = [entry for entry in logs if entry["log_level"] == "error"]
    assert str(status) in repr(error) or status == 422
    assert response.headers["x-request-id"] in repr(error)
    assert API_KEY not in repr(logs)


AGENTS = """
[agents.support]
agent_id = "agt_gone"
fixed_variables = { tier = "gold" }
fixed_overrides = { tts = { speed = 9.0 } }
"""
TABLE = "BROKER_AGENTS_FILE: agents.support"
BLAMED: dict[str, tuple[int, list[list[Any]], str | None]] = {
    "key": (401, [], "ONEINBOX_API_KEY"),
    "rights": (403, [], "ONEINBOX_API_KEY"),
    "credit": (402, [], None),
    "agent": (404, [], f"{TABLE}.agent_id"),
    "form of the agent's id": (422, [["body", "agent_id"]], f"{TABLE}.agent_id"),
    "fixed variable": (422, [["body", "variables", "tier"]], f"{TABLE}.fixed_variables.tier"),
    "fixed override": (422, [["body", "overrides", "tts", "speed"]], f"{TABLE}.fixed_overrides.tts"),
    "trusted variable": (422, [["body", "variables", "plan"]], "BROKER_VARIABLES_FROM_CLAIMS"),
    "several": (
        422,
        [["agent_id"], ["body", "variables", "tier"], ["variables", "tier"]],
        f"{TABLE}.agent_id, {TABLE}.fixed_variables.tier",
    ),
    "nothing of ours": (422, [["body", "kind"], ["body", "variables"], [1], []], None),
    "outage": (500, [], None),
}


@pytest.mark.parametrize(("status", "locs", "setting"), BLAMED.values(), ids=BLAMED.keys())
async def test_the_log_names_the_agent_and_the_setting(
    upstream: Upstream,
    open_broker: OpenBroker,
    logs: Logs,
    tmp_path: Path,
    *,
    status: int,
    locs: list[list[Any]],
    setting: str | None,
) -> None:
    (tmp_path / "agents.toml").write_text(AGENTS)
    secret = "s" * 32
    broker = await open_broker(
        ONEINBOX_AGENT_ID="",
        BROKER_AGENTS_FILE=str(tmp_path / "agents.toml"),
        BROKER_AUTH="jwt",
        BROKER_JWT_SECRET=secret,
        BROKER_VARIABLES_FROM_CLAIMS="plan=plan",
    )
    claims = {"sub": "ada", "exp": int(time.time()) + 60, "plan": "pro"}
    upstream.start.respond(status, json=rejected(*locs))
    token = jwt.encode(claims, secret)
    response = await post_session(broker, {"agent": "support"}, Authorization=f"Bearer {token}")
    assert response.status_code == 502
    assert "support" not in response.text
    (line,) = [entry for entry in logs if entry["event"] == "upstream_failed"]
    assert (line["agent"], line["agent_id"], line.get("setting")) == ("support", "agt_gone", setting)
    assert line["reason"] == ("rejected the request" if status == 422 else f"answered {status}")


PAUSES: dict[str, tuple[str | None, range]] = {
    "none": (None, range(5, 6)),
    "seconds": ("7", range(7, 8)),
    "with-blanks": (" 7 ", range(7, 8)),
    "zero": ("0", range(1, 6)),
    "an-hour": ("3600", range(60, 61)),
    "huge": ("9" * 400, range(5, 61)),
    "negative": ("-3", range(1, 6)),
    "fraction": ("1.5", range(1, 6)),
    "nonsense": ("soon", range(5, 6)),
    "a-date-gone-by": ("Wed, 21 Oct 2015 07:28:00 GMT", range(1, 6)),
    "a-zone-beyond-all-days": ("Wed, 21 Oct 2015 07:28:00 +99999999999999999", range(1, 6)),
    "a-year-beyond-all": ("Wed, 21 Oct 99999999999999999 07:28:00 GMT", range(5, 6)),
    "digits-beyond-all": ("Wed, " + "9" * 5000 + " Oct 2015 07:28:00 GMT", range(5, 6)),
    "other-digits": ("٣٠", range(5, 6)),
    "infinite": ("inf", range(5, 6)),
}


@pytest.mark.parametrize(("retry_after", "waits"), PAUSES.values(), ids=PAUSES.keys())
async def test_a_429_is_passed_on_as_busy(
    retry_after: str | None, waits: range, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    headers = [] if retry_after is None else [(b"Retry-After", retry_after.encode())]
    upstream.start.mock(return_value=httpx.Response(429, headers=headers))

    response = await post_session(broker)

    assert_problem(response, "upstream-busy")
    assert int(response.headers["retry-after"]) in waits


BROWSERS = {
    "variables": {"name": "Ada"},
    "metadata": {"order": {"id": 1}},
    "overrides": {"tts": {"speed": 99}},
    "participant_metadata": "x",
}
THEIRS: dict[str, list[Any]] = {
    "variable": [["body", "variables", "name"]],
    "below-a-variable": [["body", "variables", "name", "str"]],
    "override": [["body", "overrides", "tts", "speed"]],
    "override-branch": [["body", "overrides", "tts"]],
    "metadata": [["body", "metadata", "order", "id"]],
    "livekits-metadata": [["body", "metadata", "participant_metadata"]],
    "all-variables": [["body", "variables"]],
    "all-overrides": [["body", "overrides"]],
    "two": [["body", "variables", "name"], ["body", "overrides", "tts", "speed"]],
}


@pytest.mark.parametrize("locs", THEIRS.values(), ids=THEIRS.keys())
async def test_a_422_about_what_the_browser_sent_is_the_browsers(
    locs: list[Any], open_broker: OpenBroker, upstream: Upstream
) -> None:
    broker = await open_broker(BROKER_ALLOWED_OVERRIDES="tts.speed")
    upstream.start.respond(422, json=rejected(*locs))

    problem = assert_problem(await post_session(broker, BROWSERS), "upstream-rejected")

    assert [error["loc"] for error in problem["errors"]] == locs
    assert {error["msg"] for error in problem["errors"]} == {"too odd"}
    assert "echo" not in json.dumps(problem)
    upstream.works_again()
    assert remaining(await post_session(broker)) == 4


OURS: dict[str, Any] = {
    "agent": rejected(["body", "agent_id"]),
    "one-of-two": rejected(["body", "variables", "name"], ["body", "agent_id"]),
    "a-variable-not-sent": rejected(["body", "variables", "other"]),
    "an-override-not-sent": rejected(["body", "overrides", "tts", "voice_id"]),
    "broker-metadata": rejected(["body", "metadata", "broker_user"]),
    "all-metadata": rejected(["body", "metadata"]),
    "header": rejected(["header", "authorization"]),
    "body": rejected(["body"]),
    "unknown-field": rejected(["body", "agent"]),
    "odd-field": rejected(["body", 0]),
    "no-loc": {"detail": [{"msg": "x", "type": "y"}]},
    "odd-loc": rejected("variables.name"),
    "odd-loc-parts": rejected(["body", "variables", {"name": 1}]),
    "empty-loc": rejected([]),
    "no-errors": {"detail": []},
    "text": {"detail": "Bad variables"},
    "no-detail": {"message": "Bad variables"},
    "no-object": ["variables"],
    "odd-list": {"detail": ["variables"]},
    "the-last-of-many": rejected(*[["body", "variables", "name"]] * 30, ["body", "agent_id"]),
    "partly-odd-list": {"detail": ["agent_id", {"loc": ["body", "variables", "name"], "msg": "x", "type": "y"}]},
}


@pytest.mark.parametrize("answer", OURS.values(), ids=OURS.keys())
async def test_any_other_422_is_the_operators(answer: Any, open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_ALLOWED_OVERRIDES="tts.speed")
    upstream.start.respond(422, json=answer)

    assert_problem(await post_session(broker, BROWSERS), "upstream-misconfigured")


MIXED_AGENT = """
[agents.mixed]
agent_id = "agt_1"
default = true
overrides = ["tts.speed"]
fixed_variables = { tier = "gold" }
fixed_overrides = { tts = { voice_id = "anna" } }
"""


@pytest.mark.parametrize("field", ["variables", "overrides"])
async def test_a_422_about_a_whole_field_is_the_operators_if_the_operator_added_to_it(
    field: str, open_broker: OpenBroker, upstream: Upstream, tmp_path: Path
) -> None:
    agents = tmp_path / "agents.toml"
    agents.write_text(MIXED_AGENT)
    broker = await open_broker(ONEINBOX_AGENT_ID="", BROKER_AGENTS_FILE=str(agents))
    upstream.start.respond(422, json=rejected(["body", field]))

    assert_problem(await post_session(broker, BROWSERS), "upstream-misconfigured")


INVALID: dict[str, Any] = {
    "broken-json": b'{"id": "call_1"',
    "empty": b"",
    "html": b"<html></html>",
    "not-utf-8": b'{"id": "\xff"}',
    "null": b"null",
    "array": [started()],
    "text": b'"call_1"',
    "no-id": without(started(), "id"),
    "no-server-url": without(started(), "server_url"),
    "no-token": without(started(), "participant_token"),
    "id-null": started(id=None),
    "id-number": started(id=7),
    "id-empty": started(id=""),
    "id-path": started(id="../agents"),
    "id-long": started(id="a" * 129),
    "id-with-a-newline": started(id="call_1\n"),
    "id-with-a-dot": started(id="call.1"),
    "server-url-null": started(server_url=None),
    "server-url-number": started(server_url=1),
    "server-url-object": started(server_url={"url": "wss://voice.oneinbox.ai"}),
    "server-url-empty": started(server_url=""),
    "server-url-http": started(server_url="http://voice.oneinbox.ai"),
    "server-url-https": started(server_url="https://voice.oneinbox.ai"),
    "server-url-ws": started(server_url="ws://voice.oneinbox.ai"),
    "server-url-ws-on-loopback": started(server_url="ws://127.0.0.1:7880"),
    "server-url-javascript": started(server_url="javascript:alert(1)"),
    "server-url-without-a-host": started(server_url="wss://"),
    "server-url-with-a-newline": started(server_url="wss://voice.oneinbox.ai\r\nx: y"),
    "server-url-with-a-blank": started(server_url="wss://voice oneinbox.ai"),
    "server-url-huge": started(server_url="wss://" + "a" * 100_000),
    "token-null": started(participant_token=None),
    "token-number": started(participant_token=1),
    "token-empty": started(participant_token=""),
    "token-object": started(participant_token={"jwt": TOKEN}),
    "token-with-a-newline": started(participant_token=f"{TOKEN}\n"),
    "token-long": started(participant_token="a" * 20_000),
    "token-huge": started(participant_token="a" * 1_000_000),
}


@pytest.mark.parametrize("answer", INVALID.values(), ids=INVALID.keys())
async def test_an_answer_that_is_no_session_is_invalid_and_counts(
    answer: Any, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    upstream.start.respond(201, content=answer if isinstance(answer, bytes) else json.dumps(answer))

    response = await post_session(broker)

    assert_problem(response, "upstream-invalid")
    assert TOKEN not in response.text
    upstream.works_again()
    assert remaining(await post_session(broker)) == 3


class Encoded(httpx.AsyncBaseTransport):
    """A OneInbox that claims an encoding."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert request.headers["accept-encoding"] == "identity"
        body = httpx.ByteStream(json.dumps(started()).encode())
        return httpx.Response(201, headers={"Content-Encoding": self.encoding}, stream=body)


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
async def test_an_encoded_response_that_was_not_requested_is_invalid(encoding: str, open_broker: OpenBroker) -> None:
    broker = await open_broker(transport=Encoded(encoding))

    assert_problem(await post_session(broker), "upstream-invalid")


LOST: dict[str, tuple[type[httpx.TransportError], str]] = {
    "read-timeout": (httpx.ReadTimeout, "upstream-timeout"),
    "write-timeout": (httpx.WriteTimeout, "upstream-timeout"),
    "connection-lost": (httpx.ReadError, "upstream-error"),
    "write-error": (httpx.WriteError, "upstream-error"),
    "protocol-error": (httpx.RemoteProtocolError, "upstream-error"),
}
UNSENT: dict[str, tuple[type[httpx.TransportError], str]] = {
    "connect-error": (httpx.ConnectError, "upstream-unreachable"),
    "connect-timeout": (httpx.ConnectTimeout, "upstream-unreachable"),
    "proxy-error": (httpx.ProxyError, "upstream-unreachable"),
}


@pytest.mark.parametrize(("error", "slug"), UNSENT.values(), ids=UNSENT.keys())
async def test_what_was_never_sent_does_not_count(
    error: type[httpx.TransportError], slug: str, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    upstream.start.mock(side_effect=error("internal.host:5432"))

    response = await post_session(broker)

    assert_problem(response, slug)
    assert "internal.host" not in response.text
    upstream.works_again()
    assert remaining(await post_session(broker)) == 4


class BrokenUpstream(Upstream):
    """Fails in a way that nobody foresaw, until it `works`; `sent` True: once the request was written."""

    sent = works = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.works or request.url.path != "/v1/calls/web":
            return await super().handle_async_request(request)
        if self.sent:
            request.extensions["before_sending"]()
        raise LookupError("not foreseen")


def fail(*_: Any, **__: Any) -> Any:
    raise UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "not foreseen")


# What fails; None: the transport.
BUGS = {
    "metadata": "app.sessions.service.Sessions._metadata",
    "json": "app.oneinbox.client.to_json",
    "request": "app.oneinbox.client.OneInbox._request",
    "transport": None,
}


@pytest.mark.parametrize("key", [None, "0123456789abcdef"], ids=["no-key", "key"])
@pytest.mark.parametrize("broken", BUGS.values(), ids=BUGS.keys())
async def test_whatever_fails_before_sending_is_given_back(
    open_broker: OpenBroker, monkeypatch: pytest.MonkeyPatch, broken: str | None, key: str | None
) -> None:
    upstream = BrokenUpstream()
    upstream.works = broken is not None
    broker = await open_broker(transport=upstream, BROKER_MAX_LIVE_CALLS="1", BROKER_SESSION_LIMITS="2/day")
    headers = {"idempotency_key": key} if key else {}
    for _ in range(3):
        with monkeypatch.context() as patch:
            if broken is not None:
                patch.setattr(broken, fail)
            assert_problem(await post_session(broker, **headers), "internal-error")
    assert not upstream.requests, "nothing was sent, and no lost call is looked for"
    upstream.works = True

    response = await post_session(broker, **headers)

    assert_session(response)
    assert remaining(response, "user-day") == 1


async def test_whatever_fails_after_sending_counts_as_a_lost_call(open_broker: OpenBroker) -> None:
    upstream = BrokenUpstream()
    upstream.sent = True
    broker = await open_broker(transport=upstream, BROKER_MAX_LIVE_CALLS="1")

    assert_problem(await post_session(broker), "internal-error")

    assert_problem(await post_session(broker), "too-many-live-calls")


@pytest.mark.parametrize(("error", "slug"), LOST.values(), ids=LOST.keys())
async def test_what_may_have_been_received_counts(
    error: type[httpx.TransportError], slug: str, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    upstream.start.mock(side_effect=error("internal.host:5432"))

    response = await post_session(broker)

    assert_problem(response, slug)
    assert "internal.host" not in response.text
    assert upstream.start.call_count == 1
    upstream.works_again()
    assert remaining(await post_session(broker)) == 3


async def test_the_whole_answer_has_a_time_limit(open_broker: OpenBroker, upstream: Upstream) -> None:
    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    broker = await open_broker(ONEINBOX_TIMEOUT="0.05")
    upstream.start.mock(side_effect=never)

    assert_problem(await post_session(broker), "upstream-timeout")
    upstream.works_again()
    assert remaining(await post_session(broker)) == 3


async def test_a_failure_leaks_no_session(broker: httpx.AsyncClient, upstream: Upstream, logs: Logs) -> None:
    upstream.start.respond(201, json=started(id="call_9", server_url="http://voice.oneinbox.ai"))

    response = await post_session(broker)

    assert "location" not in response.headers
    assert "call_9" not in response.text
    assert TOKEN not in repr(logs)


async def test_errors_report_what_is_left_too(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    upstream.start.respond(500)

    assert remaining(await post_session(broker)) == 4


async def test_a_good_answer_after_failures(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    for status in (500, 401):
        upstream.start.respond(status)
        await post_session(broker)
    upstream.works_again()

    assert_session(await post_session(broker))
