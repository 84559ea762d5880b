"""`doctor --probe` against servers of every kind: what it says, and that nothing it sends can start a call."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from app.api.middleware.security_headers import ALWAYS, UNLESS_SET
from app.doctor.findings import Finding, as_text
from app.doctor.probe import PROBES, probe
from app.problems import KINDS
from app.sessions.schemas import SessionRequest
from tests.support.simulated_time import in_simulated_time

URL = "https://voice.example/prefix"
KNOWN = "/prefix/problems/forbidden-origin"
HEADERS = {name.decode(): value.decode() for name, value in (*UNLESS_SET, *ALWAYS)} | {"x-request-id": "1"}
Answering = Callable[[httpx.Request, str], httpx.Response]


def problem(slug: str, **headers: str) -> httpx.Response:
    """An error as brokers answer it."""
    status = KINDS[slug].status
    body = {"type": f"/prefix/problems/{slug}", "title": "", "status": status, "detail": ""}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, headers=HEADERS | named, json=body)


def good(request: httpx.Request, path: str) -> httpx.Response:
    """A broker in jwt mode that does all that it must."""
    unprotected = {"/prefix/healthz": {"status": "ok"}, "/prefix/readyz": {"status": "ok", "checks": {}}}
    if "origin" in request.headers and not path.startswith("/prefix/webhooks/"):
        return problem("forbidden-origin")
    if path == KNOWN:
        return httpx.Response(200, headers=HEADERS, json={"slug": "forbidden-origin"})
    if request.method not in ("GET", "POST"):
        return problem("method-not-allowed")
    if path in unprotected:
        return httpx.Response(200, headers=HEADERS, json=unprotected[path])
    if path == "/prefix/session":
        if len(request.content) > 16384 and "content-length" in request.headers:
            return problem("body-too-large")
        if request.headers["content-type"] != "application/json":
            return problem("unsupported-media-type")
        return problem("unauthenticated", www_authenticate="Bearer")
    if path.startswith("/prefix/calls"):
        return problem("unauthenticated", www_authenticate="Bearer")
    return problem("not-found")


def mock(answer: Callable[[httpx.Request], Awaitable[httpx.Response]]) -> httpx.MockTransport:
    """A transport whose answers are still to be read, as those of a real one."""

    async def streamed(request: httpx.Request) -> httpx.Response:
        await request.aread()
        canned = await answer(request)
        return httpx.Response(canned.status_code, headers=canned.headers, stream=canned.stream)

    return httpx.MockTransport(streamed)


class Server:
    """Answers as told, and keeps what it was sent. `paths`: targets as they went out."""

    def __init__(self, answer: Answering) -> None:
        self.requests: list[httpx.Request] = []
        self.paths: list[str] = []
        self._answer = answer

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.extensions["target"].decode()
        self.requests.append(request)
        self.paths.append(path)
        # Plain http is not served.
        return self._answer(request, path) if request.url.scheme == "https" else httpx.Response(308)

    async def probed(self, url: str = URL, **options: Any) -> dict[str, Finding]:
        """The findings, by name."""
        found = await probe(url, transport=mock(self), **options)
        return {finding.name: finding for finding in found}


def but(path: str, answer: Answering) -> Answering:
    """A good broker but for one route."""
    return lambda request, asked: answer(request, asked) if asked == path else good(request, asked)


async def wrong(answer: Answering) -> set[str]:
    """What is wrong with such a server."""
    return {name for name, finding in (await Server(answer).probed()).items() if not finding.ok}


async def test_nothing_is_wrong_with_a_good_one() -> None:
    found = await Server(good).probed()
    assert {finding.level for finding in found.values()} == {"ok"}
    assert list(found) == ["broker", *PROBES]


# It starts no call


def always(status: int, **more: Any) -> Answering:
    return lambda request, path: httpx.Response(status, **more) if path != KNOWN else good(request, path)


ANY_SERVER: Mapping[str, Answering] = {
    "good": good,
    "takes-all": always(201, json={"server_url": "wss://a.example", "participant_token": "t"}),
    "wants-an-origin": lambda request, path: good(request, path) if path == KNOWN else problem("forbidden-origin"),
    "fails": always(500),
    "silent": always(503),
}


@pytest.mark.parametrize("answer", ANY_SERVER.values(), ids=ANY_SERVER.keys())
async def test_no_request_can_start_a_call(answer: Answering) -> None:
    server = Server(answer)
    await server.probed()
    assert len(server.requests) > 30
    for request, path in zip(server.requests, server.paths, strict=True):
        if request.method == "TRACE":
            assert path == "/prefix/healthz"
        elif request.method == "OPTIONS":
            assert "access-control-request-method" in request.headers
        elif request.method != "GET" and not path.endswith("/healthz"):
            body = json.loads(request.content)
            for name in body:  # one by one: none of them depends on the others
                with pytest.raises(ValidationError):
                    SessionRequest.model_validate({name: body[name]})


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(404, text="nothing here"),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json={"slug": "another"}),
        httpx.Response(200, json=["forbidden-origin"]),
        httpx.Response(500),
    ],
)
async def test_a_server_that_is_no_broker_is_asked_for_one_page(answer: httpx.Response) -> None:
    server = Server(lambda _, path: answer)
    found = await server.probed()
    assert [(request.method, path) for request, path in zip(server.requests, server.paths, strict=True)] == [
        ("GET", KNOWN)
    ]
    assert list(found) == ["broker"]
    assert found["broker"].detail.startswith("this is not a broker")
    assert "prefix" in found["broker"].remedy


async def test_redirects_are_not_followed() -> None:
    server = Server(lambda request, path: httpx.Response(302, headers={"Location": "https://evil.example"}))
    found = await server.probed()
    assert len(server.requests) == 1
    assert "302, a redirect, which is not followed" in found["broker"].detail


async def test_nobody_there() -> None:
    async def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("hush")

    (finding,) = await probe(URL, transport=mock(refuse))
    assert finding.detail == "cannot be reached: no answer (ConnectError)"


async def test_it_comes_to_an_end() -> None:
    async def hang(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    (finding,) = await probe(URL, transport=mock(hang), deadline=0.05)
    assert finding.detail.startswith("no result within")


@in_simulated_time
async def test_what_takes_too_long_hides_nothing_else() -> None:
    server = Server(good)

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/prefix" and request.extensions["target"] == b"/prefix/metrics":
            await asyncio.Event().wait()
        return await server(request)

    found = {finding.name: finding for finding in await probe(URL, transport=mock(answer), deadline=2)}
    assert [name for name, finding in found.items() if not finding.ok] == ["metrics"]
    assert found["metrics"].detail.startswith("no result within")


async def test_what_a_server_says_is_not_repeated() -> None:
    """Its words could be anything, escape sequences included."""
    evil = {"type": "/problems/\x1b[2Jevil", "slug": "\x1b[2Jevil", "title": "evil"}
    server = Server(lambda request, path: good(request, path) if path == KNOWN else httpx.Response(418, json=evil))
    text = as_text(list((await server.probed()).values()), encoding="utf-8", colour=False)
    assert "evil" not in text
    assert "\x1b" not in text


async def test_endless_answers_are_cut() -> None:
    sent = 0

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            nonlocal sent
            while True:
                sent += 65536
                yield b"x" * 65536

    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Endless())

    (finding,) = await probe(URL, transport=mock(answer))
    assert not finding.ok
    assert sent <= 3 * 65536


async def test_odd_paths_go_out_as_they_stand() -> None:
    server = Server(good)
    await server.probed()
    assert {"/prefix/calls/../x", "/prefix/calls/%2e%2e", "/prefix/calls/" + "a" * 129} <= set(server.paths)
    assert all(path.startswith("/prefix/") for path in server.paths)
    assert {request.url.host for request in server.requests} == {"voice.example"}


async def test_no_answer_of_one_probe_follows_another_by_cookie() -> None:
    server = Server(
        lambda request, path: (
            httpx.Response(200, headers=[("set-cookie", "a=b")], json=good(request, path).json())
            if path == KNOWN
            else good(request, path)
        )
    )
    await server.probed()
    assert not any("cookie" in request.headers for request in server.requests)


# What it finds


def with_headers(response: httpx.Response, **headers: str) -> httpx.Response:
    response.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    return response


def without_header(name: str) -> Answering:
    def answer(request: httpx.Request, path: str) -> httpx.Response:
        response = good(request, path)
        del response.headers[name]
        return response

    return answer


def any_origin(request: httpx.Request, path: str) -> httpx.Response:
    """As under `*`, but for CORS headers."""
    if request.headers.get("origin") == "null":
        return problem("forbidden-origin")
    request.headers.pop("origin", None)
    return good(request, path)


def null_origin(request: httpx.Request, path: str) -> httpx.Response:
    if request.headers.get("origin") == "null":
        del request.headers["origin"]
    return good(request, path)


def own_by_suffix(request: httpx.Request, path: str) -> httpx.Response:
    if request.headers.get("origin", "").startswith("https://voice.example"):
        del request.headers["origin"]
    return good(request, path)


def own_by_forwarded_host(request: httpx.Request, path: str) -> httpx.Response:
    if request.headers.get("origin") == f"https://{request.headers.get('x-forwarded-host')}":
        del request.headers["origin"]
    return good(request, path)


def cors_of_a_proxy(request: httpx.Request, path: str) -> httpx.Response:
    return with_headers(good(request, path), access_control_allow_origin="*")


def takes_any_token(request: httpx.Request, path: str) -> httpx.Response:
    if "authorization" not in request.headers:
        return good(request, path)
    if path == "/prefix/calls":
        return httpx.Response(200, headers=HEADERS, json={"items": []})
    return problem("invalid-request") if path == "/prefix/session" else good(request, path)


def takes_any_token_for_sessions(request: httpx.Request, path: str) -> httpx.Response:
    if "authorization" in request.headers and path == "/prefix/session":
        return problem("invalid-request")
    return good(request, path)


def believes_user_headers(request: httpx.Request, path: str) -> httpx.Response:
    if "x-forwarded-user" in request.headers and path == "/prefix/calls":
        return httpx.Response(200, headers=HEADERS, json={"items": []})
    return good(request, path)


def believes_underscores(request: httpx.Request, path: str) -> httpx.Response:
    if "x_forwarded_user" in request.headers and path == "/prefix/calls":
        return httpx.Response(200, headers=HEADERS, json={"items": []})
    return good(request, path)


def no_login_for_sessions(request: httpx.Request, path: str) -> httpx.Response:
    if path == "/prefix/session" and request.method == "POST" and "origin" not in request.headers:
        large = len(request.content) > 16384
        return problem("body-too-large" if large else "invalid-request")
    return good(request, path)


def echoes(request: httpx.Request, path: str) -> httpx.Response:
    return httpx.Response(200, headers=HEADERS) if request.method == "TRACE" else good(request, path)


FLAWS: Mapping[str, tuple[Answering, set[str]]] = {
    "any-origin": (any_origin, {"forged Origin"}),
    "null-origin": (null_origin, {"Origin null"}),
    "suffix": (own_by_suffix, {"forged Origin"}),
    "forwarded-host": (own_by_forwarded_host, {"forged Origin"}),
    "cors-of-a-proxy": (cors_of_a_proxy, {"forged Origin", "Origin null"}),
    "any-token": (takes_any_token, {"forged identity"}),
    "any-token-for-sessions": (takes_any_token_for_sessions, {"forged identity"}),
    "user-headers": (believes_user_headers, {"forged user header"}),
    "underscores": (believes_underscores, {"forged user header"}),
    "no-login": (
        no_login_for_sessions,
        {"no identity", "forged identity", "forged user header", "other content type"},
    ),
    "lists-for-all": (
        but("/prefix/calls", lambda _, path: httpx.Response(200, headers=HEADERS, json={"items": []})),
        {"no identity", "forged identity", "forged user header"},
    ),
    "calls-fail": (but("/prefix/calls", lambda _, path: problem("internal-error")), {"no identity"}),
    "dots": (but("/prefix/calls/../x", lambda _, path: httpx.Response(200, headers=HEADERS)), {"odd ids"}),
    "long-ids-fail": (but("/prefix/calls/" + "a" * 129, lambda _, path: problem("internal-error")), {"odd ids"}),
    "trace": (echoes, {"other methods"}),
    "metrics": (but("/prefix/metrics", lambda _, path: httpx.Response(200, headers=HEADERS)), {"metrics"}),
    "dead": (but("/prefix/healthz", lambda request, path: problem("internal-error")), {"healthz", "other methods"}),
    "not-ready": (
        but("/prefix/readyz", lambda _, path: problem("internal-error")),
        {"readyz", "forged Origin", "Origin null"},
    ),
    "no-csp": (without_header("content-security-policy"), {"security headers"}),
    "no-request-id": (without_header("x-request-id"), {"security headers"}),
    "cached": (lambda request, path: with_headers(good(request, path), cache_control="public"), {"security headers"}),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), FLAWS.values(), ids=FLAWS.keys())
async def test_flaws(answer: Answering, expected: set[str]) -> None:
    assert await wrong(answer) == expected


async def test_a_platform_that_answers_healthz_itself_is_no_fault_of_the_broker() -> None:
    """Cloud Run's front end does, from outside."""
    answer = but("/prefix/healthz", lambda _, path: httpx.Response(404, text="<html>"))
    assert await wrong(answer) == set()
    assert (await Server(answer).probed())["healthz"].level == "warning"


def session_reads(size_bound: int) -> Answering:
    """An anonymous broker whose bodies are bounded by so many bytes."""

    def answer(request: httpx.Request, path: str) -> httpx.Response:
        if path == "/prefix/session" and request.method == "POST" and "origin" not in request.headers:
            if len(request.content) > size_bound:
                return problem("body-too-large")
            return problem("invalid-request")
        return good(request, path) if not path.startswith("/prefix/calls") else problem("not-found")

    return answer


async def test_large_bodies() -> None:
    assert {"large body", "large chunked body"} <= await wrong(session_reads(1_000_000))
    assert not {"large body", "large chunked body"} & await wrong(session_reads(16384))


def counting(key_of: Callable[[httpx.Request], str], step: int = 1) -> Answering:
    """An anonymous broker that counts requests by this key."""
    used: dict[str, int] = {}

    def answer(request: httpx.Request, path: str) -> httpx.Response:
        if path != "/prefix/calls":
            return good(request, path)
        key = key_of(request)
        used[key] = used.get(key, 0) + step
        return problem("not-found", ratelimit=f'"request-minute";r={100 - used[key]};t=60')

    return answer


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        (counting(lambda _: "peer"), "ok"),
        (counting(lambda request: request.headers.get("x-forwarded-for", "peer")), "error"),
        (counting(lambda request: request.headers.get("fly-client-ip", "peer")), "error"),
        # Heroku's router in 2016: it appended to the first line, so that the last one was the client's own.
        (counting(lambda request: "".join(request.headers.get_list("x-forwarded-for")[1:]) or "peer"), "error"),
        (counting(lambda _: "peer", step=0), "warning"),
        (but("/prefix/calls", lambda _, path: problem("not-found")), "warning"),
    ],
    ids=["one-counter", "by-header", "by-another-header", "by-the-second-line", "several-processes", "no-header"],
)
async def test_forged_addresses(answer: Answering, level: str) -> None:
    assert (await Server(answer).probed())["forged address header"].level == level


async def test_anonymous_is_said() -> None:
    found = await Server(but("/prefix/calls", lambda _, path: problem("not-found"))).probed()
    assert found["no identity"].level == "warning"
    assert "anonymous" in found["no identity"].detail


def header_mode(request: httpx.Request, path: str) -> httpx.Response:
    answer = good(request, path)
    if answer.status_code == 401:
        if request.method == "POST" and request.headers.get("sec-fetch-site") != "same-origin":
            return problem("forbidden-origin")
        answer.headers["www-authenticate"] = "ForwardedUser"
    return answer


def own_origin_required(request: httpx.Request, path: str) -> httpx.Response:
    own = request.headers.get("origin") == "https://voice.example"
    if path == "/prefix/session" and request.method == "POST" and not own:
        return problem("forbidden-origin")
    if own:
        del request.headers["origin"]
    return good(request, path)


@pytest.mark.parametrize("answer", [header_mode, own_origin_required])
async def test_the_origin_check_is_satisfied_where_it_can_be(answer: Answering) -> None:
    assert {finding.level for finding in (await Server(answer).probed()).values()} == {"ok"}


async def test_an_origin_that_cannot_be_guessed() -> None:
    def answer(request: httpx.Request, path: str) -> httpx.Response:
        if path == "/prefix/session" and request.method == "POST":
            return problem("forbidden-origin")
        return good(request, path)

    found = await Server(answer).probed()
    assert all(finding.ok for finding in found.values())
    for name in ("large body", "large chunked body", "other content type"):
        assert found[name].level == "warning"
        assert "needs an Origin" in found[name].detail


@pytest.mark.parametrize("slug", ["rate-limited", "at-capacity", "blocked"])
async def test_what_cannot_be_told_is_no_flaw(slug: str) -> None:
    def answer(request: httpx.Request, path: str) -> httpx.Response:
        answered = good(request, path)
        return problem(slug) if answered.status_code in (401, 413, 415) else answered

    found = await Server(answer).probed()
    assert all(finding.ok for finding in found.values())
    assert found["no identity"].level == "warning"
    assert found["large body"].detail.startswith("inconclusive")


@pytest.mark.parametrize(("status", "http_status"), [("degraded", 200), ("draining", 503)])
async def test_readiness(status: str, http_status: int) -> None:
    ready = httpx.Response(http_status, headers=HEADERS, json={"status": status, "checks": {}})
    finding = (await Server(but("/prefix/readyz", lambda _, path: ready)).probed())["readyz"]
    assert finding.level == "warning"
    assert finding.detail.startswith(status)


@pytest.mark.parametrize(
    ("url", "plain", "level", "words"),
    [
        ("https://voice.example/prefix", 308, "ok", "in use"),
        ("https://voice.example/prefix", 200, "warning", "plain http is answered too"),
        ("https://voice.example:443/prefix/", 200, "warning", "plain http is answered too"),
        ("https://voice.example:8443/prefix", 200, "ok", "in use"),
        ("http://voice.example/prefix", 0, "warning", "anyone on the network path"),
        ("http://127.0.0.1:8000/prefix", 0, "ok", "not needed on loopback"),
        ("http://[::1]:8000/prefix", 0, "ok", "not needed on loopback"),
    ],
)
async def test_https(url: str, plain: int, level: str, words: str) -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        if plain and request.url.scheme == "http":
            assert request.url.port is None
            return httpx.Response(plain)
        return good(request, request.extensions["target"].decode())

    found = {finding.name: finding for finding in await probe(url, transport=mock(answer))}
    assert found["https"].level == level
    assert words in found["https"].detail


async def test_a_check_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> Finding:
        raise RuntimeError("hush")

    monkeypatch.setitem(PROBES, "metrics", fail)
    found = await Server(good).probed()
    assert found["metrics"].detail == "the check itself failed (RuntimeError)"
    assert sum(not finding.ok for finding in found.values()) == 1
