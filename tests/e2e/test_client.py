"""client.js in Chromium, imported by a page of another origin."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest
from playwright.sync_api import Page, Route

from tests.e2e.conftest import OpenPage, control, running_broker, running_site
from tests.support.brokers import environ_of
from tests.support.needs import program
from tests.support.ports import free_port
from tests.support.processes import ROOT, running

pytestmark = pytest.mark.browser

ORIGINS = {"BROKER_ALLOWED_ORIGINS": "http://127.0.0.1:*"}
STAND_IN = {"BROKER_LIVEKIT_CLIENT": str(ROOT / "app/sandbox/livekit-client.js")}
JWT_SECRET = "a secret of tests, 32 characters or more"
SIGNED_IN = {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": JWT_SECRET}
LOST = "ERR_FAILED|ERR_CONNECTION|ERR_INCOMPLETE|ERR_INTERNET|ERR_NETWORK|ERR_ABORTED"
CLOSED_SECONDS = 12
"""A closed page's call is stopped within this."""
BLANK = '<!doctype html><html lang="en"><meta charset="utf-8"><title>A page</title><link rel="icon" href="data:,">'
OPEN = "async (url) => { const { Broker } = await import(url + '/client.js'); window.broker = new Broker(%s); }"


@dataclass
class Visit:
    """A page that has imported client.js as `broker`. `posts`, `stops`: requests of that kind it has sent."""

    page: Page
    url: str
    oneinbox: str
    posts: list[str]
    stops: list[str]

    def run(self, script: str, given: Any = None) -> Any:
        """Run the body of an async function, with `broker` and `given`."""
        return self.page.evaluate(f"async (given) => {{ {script} }}", given)

    def failure(self, script: str) -> dict[str, Any]:
        """Return what a script throws."""
        caught = "(({ name, slug, status, message, detail }) => ({ name, slug, status, message, detail }))(error)"
        thrown: dict[str, Any] = self.run(f"try {{ {script} }} catch (error) {{ return {caught}; }}")
        assert thrown is not None, "nothing was thrown"
        return thrown

    def calls(self) -> list[dict[str, Any]]:
        """OneInbox's calls, newest first."""
        calls: list[dict[str, Any]] = control(self.oneinbox, "calls")
        return calls

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        """Let the page run until the condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            self.page.wait_for_timeout(50)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "index.html").write_text(BLANK, encoding="utf-8")
    with running_site(folder) as origin:
        yield origin


@pytest.fixture(scope="module")
def shared_broker(oneinbox: str) -> Iterator[str]:
    with running_broker(oneinbox, **ORIGINS, **STAND_IN) as (_, url):
        yield url


OpenVisit = Callable[..., Visit]


@pytest.fixture
def visit(open_page: OpenPage, site: str, shared_broker: str, oneinbox: str) -> Iterator[OpenVisit]:
    """Open a page: `visit("{ patience: 1 }")`; with settings, or at an `at` of its own, for another broker."""
    with ExitStack() as stack:

        def opens(options: str = "", complaints: str | None = None, at: str = "", **settings: str) -> Visit:
            url = at or shared_broker
            if settings:
                url = stack.enter_context(running_broker(oneinbox, **{**ORIGINS, **STAND_IN, **settings}))[1]
            page = open_page(complaints_expected=complaints, permissions=["microphone"])
            there = Visit(page, url, oneinbox, [], [])

            def on_request(request: Any) -> None:
                if request.method == "POST":
                    (there.posts if request.url.endswith("/session") else there.stops).append(request.url)

            page.on("request", on_request)
            page.goto(site)
            page.evaluate(OPEN % options, url)
            stack.callback(lambda: page.is_closed() or page.goto("about:blank"))
            return there

        yield opens


def starts(oneinbox: str) -> int:
    """The number of calls that OneInbox was ever asked for."""
    return sum(each["path"] == "/v1/calls/web" for each in control(oneinbox, "requests"))


def call_of(oneinbox: str, url: str) -> dict[str, Any]:
    """OneInbox's record of the call at this address."""
    call_id = url.rsplit("/", 1)[1].partition(".")[0]
    found: dict[str, Any] = next(call for call in control(oneinbox, "calls") if call["id"] == call_id)
    return found


def hold(oneinbox: str, url: str) -> None:
    """Keep a call in progress, however slow this machine is."""
    control(oneinbox, f"calls/{call_of(oneinbox, url)['id']}", {"status": "in_progress"})


# --- start ---


def test_a_call_is_started_followed_and_ended(visit: OpenVisit) -> None:
    there = visit()
    seen = there.run(
        """
        const call = await broker.start({ variables: { customer_name: "Ada" }, metadata: { page: "/pricing" } });
        const seen = [Object.keys(call).includes("url"), call.serverUrl, call.participantToken.split(".").length];
        call.on("change", (event) => event.detail && seen.push(event.detail.status));
        const over = new Promise((resolve) => call.on("end", (event) => resolve(event.detail.end_reason)));
        call.follow();
        await new Promise((resolve) => setTimeout(resolve, 500));
        await call.hangUp();
        await call.hangUp();
        return [...seen, await over, call.ended];
        """
    )
    assert seen[:4] == [True, "ws://127.0.0.1:7880", 3, "queued"]
    assert seen[-3:] == ["completed", "api_stop", True]
    assert len(there.posts) == 1
    assert len(there.stops) == 1


def test_a_lost_answer_starts_no_second_call(visit: OpenVisit, oneinbox: str) -> None:
    there = visit("{ patience: 30 }", LOST)
    before = starts(oneinbox)
    lost: list[str] = []

    def lose_two(route: Route) -> None:
        if route.request.method == "POST" and len(lost) < 2:
            lost.append(route.fetch().json()["participant_token"])
            route.abort()
        else:
            route.continue_()

    there.page.route("**/session", lose_two)
    token = there.run("const call = await broker.start(); await call.hangUp(); return call.participantToken;")
    assert [token, token] == lost
    assert starts(oneinbox) == before + 1


PROXY_ERRORS = {
    "html-502": (502, "text/html", "<h1>Bad Gateway</h1>"),
    "html-503": (503, "text/html", "<h1>Unavailable</h1>"),
    "html-200": (200, "text/html", "<h1>Sign in to the Wi-Fi</h1>"),
    "empty-504": (504, "text/plain", ""),
    "no-call-201": (201, "application/json", "{}"),
}


@pytest.mark.parametrize("answer", PROXY_ERRORS.values(), ids=PROXY_ERRORS.keys())
def test_a_proxys_answer_is_asked_past(visit: OpenVisit, answer: tuple[int, str, str]) -> None:
    there = visit(complaints="status of 50")
    status, media_type, body = answer
    told: list[str] = []

    def interfere(route: Route) -> None:
        if route.request.method != "POST" or told:
            return route.continue_()
        told.append(route.request.headers["idempotency-key"])
        headers = {"Access-Control-Allow-Origin": "*", "Content-Type": media_type}
        return route.fulfill(status=status, headers=headers, body=body)

    there.page.route("**/session", interfere)
    there.run("await (await broker.start()).hangUp();")
    assert len(there.posts) == 2


def test_retry_after_is_waited_for_within_patience(visit: OpenVisit) -> None:
    there = visit(complaints="status of 429", BROKER_SESSION_LIMITS="1/second")
    there.run("await broker.start(); await broker.start();")
    assert len(there.posts) in (2, 3)
    assert call_of(there.oneinbox, there.run("return (await broker.start()).url;"))


def test_more_than_patience_is_refused_at_once(visit: OpenVisit) -> None:
    there = visit(complaints="status of 429", BROKER_SESSION_LIMITS="1/hour")
    there.run("await broker.start();")
    error = there.failure("await broker.start();")
    assert (error["name"], error["slug"], error["status"]) == ("BrokerError", "rate-limited", 429)
    assert len(there.posts) == 2


def test_an_aborted_start_leaves_no_call(visit: OpenVisit, oneinbox: str) -> None:
    there = visit()
    thrown = there.run(
        """
        const stop = new AbortController();
        const started = broker.start({ signal: stop.signal });
        await new Promise((resolve) => setTimeout(resolve, 0));
        stop.abort();
        return started.catch((error) => error.name);
        """
    )
    assert thrown == "AbortError"
    there.wait_for(lambda: there.calls()[0]["status"] == "completed")
    assert (
        there.run("return broker.start({ signal: AbortSignal.abort() }).catch((error) => error.name);") == "AbortError"
    )
    assert len(there.posts) == 1


def test_a_login_and_a_challenge_are_fresh_for_each_request(visit: OpenVisit) -> None:
    token = jwt.encode({"sub": "ada", "exp": int(time.time()) + 600}, JWT_SECRET, "HS256")
    options = f"{{ token: async () => (window.logins = (window.logins ?? 0) + 1, {json.dumps(token)}) }}"
    there = visit(options, LOST, **SIGNED_IN)
    headers: list[dict[str, str]] = []

    def lose_the_first(route: Route) -> None:
        if route.request.method == "POST":
            headers.append(route.request.headers)
        if len(headers) == 1:
            route.abort()
        else:
            route.continue_()

    there.page.route("**/session", lose_the_first)
    there.run("let n = 0; await (await broker.start({ challenge: () => `proof-${++n}` })).hangUp();")
    assert [each["x-challenge-token"] for each in headers] == ["proof-1", "proof-2"]
    assert {each["authorization"] for each in headers} == {f"Bearer {token}"}
    assert there.run("return window.logins;") == 3


def test_a_login_that_is_gone_is_not_sent(visit: OpenVisit) -> None:
    """Somebody signs out, and the page stays open: the next visitor is not taken for them."""
    there = visit("{ token: async () => window.login }", "status of 401", **SIGNED_IN)
    there.run(f"window.login = {signed_in()}; await (await broker.start()).hangUp(); window.login = undefined;")
    assert there.failure("await broker.start();")["slug"] == "unauthenticated"


# --- bad input ---

MISUSED = {
    "an option of Broker": ("new (await import(given + '/client.js')).Broker({ ulr: 'x' });", "Broker.*ulr"),
    "two options": ("new (await import(given + '/client.js')).Broker({ ulr: 'x', tokn: 1 });", "ulr, tokn"),
    "no address": ("new (await import(given + '/client.js')).Broker({ url: 'http://' });", "is not an http"),
    "an address without its scheme": (
        "new (await import(given + '/client.js')).Broker({ url: 'talk.example.com' });",
        "is not an http.*talk.example.com",
    ),
    "another scheme": (
        "new (await import(given + '/client.js')).Broker({ url: 'ftp://a' });",
        "is not an http",
    ),
    "an option of start": ("await broker.start({ agnet: 'support' });", "start.*agnet"),
    "an option of talk": ("await broker.talk({ varaibles: {} });", "talk.*varaibles"),
    "an option of prepare": ("await broker.prepare({ agent: 'support' });", "prepare.*agent"),
}


@pytest.mark.parametrize(("script", "words"), MISUSED.values(), ids=MISUSED.keys())
def test_a_mistake_is_a_type_error_that_names_it(visit: OpenVisit, script: str, words: str) -> None:
    there = visit()
    error = there.run(f"try {{ {script} }} catch (error) {{ return [error.name, error.message]; }}", there.url)
    assert error is not None
    assert error[0] == "TypeError"
    assert re.search(words, error[1])
    assert there.posts == []


FAILURES = {
    "a token function throws": ("{ token: () => { throw new Error('x'); } }", "start()", "login-failed"),
    "a token function rejects": ("{ token: async () => { throw new Error('x'); } }", "start()", "login-failed"),
    "resume with such a token": ("{ token: async () => { throw 1; } }", "start()", "login-failed"),
    "a challenge throws": ("", "start({ challenge: () => { throw new Error('x'); } })", "challenge-failed"),
    "no server": ("{ url: 'http://127.0.0.1:9', patience: 0 }", "start()", "unreachable"),
    "a web site": ("{ url: location.origin, patience: 0 }", "start()", "not-a-broker"),
    "no server, before livekit-client": ("{ url: 'http://127.0.0.1:9' }", "talk()", "unreachable"),
    "a web site, before livekit-client": ("{ url: location.origin }", "talk()", "not-a-broker"),
    "an agent that is none": ("", "start({ agent: 'nobody' })", "agent-not-allowed"),
    "a variable that is none": ("", "start({ variables: { a: [] } })", "invalid-request"),
    "livekit-client is not there": ("", "talk({ livekit: '/absent.js' })", "livekit-missing"),
    "livekit-client is something else": ("", "talk({ livekit: 'data:text/javascript,1' })", "livekit-missing"),
    "a livekit function throws": ("", "talk({ livekit: () => { throw new Error('x'); } })", "livekit-missing"),
    "the room cannot be joined": (
        "",
        "talk({ livekit: { Room: class { on() {} async connect() { throw new Error('x'); } disconnect() {} } } })",
        "not-joined",
    ),
}


@pytest.mark.parametrize(("options", "script", "slug"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_is_a_broker_error_in_words(visit: OpenVisit, options: str, script: str, slug: str) -> None:
    there = visit(options, "Failed to load|ERR_|CORS|MIME")
    error = there.failure(f"await broker.{script};")
    assert (error["name"], error["slug"]) == ("BrokerError", slug)
    assert re.fullmatch(r"[A-Z][^{}]+[a-z]\.?", error["message"]), "a sentence for a user"
    assert len(there.stops) == (slug == "not-joined")
    asked = script.startswith("start") and slug not in ("login-failed", "challenge-failed")
    assert bool(there.posts) == (asked or slug == "not-joined")


def test_an_error_names_the_invalid_fields(visit: OpenVisit) -> None:
    there = visit(complaints="status of 422")
    [error] = there.run("return broker.start({ variables: { a: [] } }).catch(({ errors }) => errors);")
    assert error["loc"] == ["body", "variables", "a"]


def test_a_broker_without_livekit_client_is_not_taken_for_a_dead_one(visit: OpenVisit) -> None:
    there = visit(complaints="status of 404|Failed to load", BROKER_LIVEKIT_CLIENT="")
    error = there.failure("await broker.talk();")
    assert (error["slug"], error["detail"]) == ("livekit-missing", f"{there.url}/livekit-client.js")
    assert there.posts == []


MICROPHONES = {
    "denied": ("NotAllowedError", "microphone-denied"),
    "none": ("NotFoundError", "microphone-missing"),
    "not that one": ("OverconstrainedError", "microphone-missing"),
    "in use": ("NotReadableError", "microphone-unavailable"),
}


@pytest.mark.parametrize(("name", "slug"), MICROPHONES.values(), ids=MICROPHONES.keys())
def test_without_a_microphone_no_call_is_started(visit: OpenVisit, name: str, slug: str) -> None:
    there = visit()
    there.run("navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', given); };", name)
    assert there.failure("await broker.talk();")["slug"] == slug
    assert there.posts == []


def test_a_refusal_lets_the_microphone_go(visit: OpenVisit) -> None:
    there = visit(complaints="status of 429", BROKER_SESSION_LIMITS="1/hour")
    there.run("await broker.start();")
    states = there.run(
        """
        const real = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices), tracks = [];
        navigator.mediaDevices.getUserMedia = async (wanted) => {
          const stream = await real(wanted);
          tracks.push(...stream.getTracks());
          return stream;
        };
        const slug = await broker.talk().catch((error) => error.slug);
        return [slug, ...tracks.map((track) => track.readyState)];
        """
    )
    assert states == ["rate-limited", "ended"]


def test_the_page_is_told_how_far_it_is_and_joins(visit: OpenVisit) -> None:
    there = visit()
    steps = there.run(
        """
        const steps = [];
        const call = await broker.talk({ progress: (step) => steps.push(step) });
        steps.push(call.room !== null, call.muted);
        call.mute();
        steps.push(call.muted, call.level("user"));
        await call.hangUp();
        return [...steps, call.room];
        """
    )
    assert steps == ["asking", "connecting", True, False, True, 0, None]


# --- follow ---

FOLLOWED = """
  const call = (window.call = await broker.start());
  window.seen = [];
  for (const name of ["change", "end", "error"]) {
    call.on(name, (event) => seen.push(name === "change" ? event.detail.status : name));
  }
  call.follow();
  return call.url;
"""


def test_following_goes_on_after_the_network_was_gone(visit: OpenVisit, oneinbox: str) -> None:
    there = visit(complaints=LOST)
    url = there.run(FOLLOWED)
    there.wait_for(lambda: there.run("return seen;") != [])
    there.page.context.set_offline(True)
    hold(oneinbox, url)
    there.page.wait_for_timeout(500)
    there.page.context.set_offline(False)
    there.wait_for(lambda: "in_progress" in there.run("return seen;"))
    there.run("await call.hangUp();")
    there.wait_for(lambda: there.run("return seen.at(-1);") == "end")


@contextmanager
def nginx(folder: Path, broker: str) -> Iterator[str]:
    """An nginx in front of a broker; yield its URL."""
    port = free_port()
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error; events {{}} "
        f"http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {broker}; "
        "proxy_http_version 1.1; proxy_set_header Host $http_host; proxy_buffering off; } } }",
        encoding="utf-8",
    )
    process = subprocess.Popen([program("nginx", "nginx"), "-c", f"{folder}/nginx.conf", "-p", str(folder)])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextmanager
def serving_at(port: int, folder: Path, environ: dict[str, str]) -> Iterator[None]:
    """Run a broker on this port."""
    with running("serve", "--port", str(port), cwd=folder, environ=environ) as process:
        process.wait_for_url()
        yield


DOWN_SECONDS = 5


def test_following_goes_on_after_the_broker_was_restarted_behind_nginx(
    visit: OpenVisit, oneinbox: str, tmp_path: Path
) -> None:
    port = free_port()
    environ = environ_of(oneinbox, {**ORIGINS, "BROKER_SECRET": "s" * 32})
    with nginx(tmp_path, f"http://127.0.0.1:{port}") as url:
        with serving_at(port, tmp_path, environ):
            # An answer of nginx's own has no CORS header, so the page learns nothing of it.
            there = visit(complaints=f"{LOST}|CORS|status of 502", at=url)
            hold(oneinbox, there.run(FOLLOWED))
            there.wait_for(lambda: there.run("return seen.at(-1);") == "in_progress")
        there.page.wait_for_timeout(DOWN_SECONDS * 1000)
        with serving_at(port, tmp_path, environ):
            control(oneinbox, f"calls/{there.calls()[0]['id']}", {"status": "completed"})
            there.wait_for(lambda: there.run("return seen.at(-1);") == "end", seconds=40)
            assert there.run("return [call.state.status, call.ended];") == ["completed", True]
            there.page.goto("about:blank")


# --- pages that go ---


def signed_in() -> str:
    return json.dumps(jwt.encode({"sub": "ada", "exp": int(time.time()) + 600}, JWT_SECRET, "HS256"))


@pytest.mark.parametrize("settings", [{}, SIGNED_IN], ids=["anonymous", "with-a-token"])
@pytest.mark.parametrize("follows", [True, False], ids=["followed", "not-followed"])
def test_a_closed_page_hangs_up(visit: OpenVisit, oneinbox: str, settings: dict[str, str], follows: bool) -> None:
    there = visit(f"{{ token: async () => {signed_in()} }}" if settings else "", LOST, **settings)
    url = there.run(FOLLOWED if follows else "return (await broker.start()).url;")
    hold(oneinbox, url)
    other = there.page.context.new_page()  # a context without pages would end the browser's requests
    closed = time.monotonic()
    there.page.close()
    while call_of(oneinbox, url)["status"] == "in_progress":
        assert time.monotonic() - closed < CLOSED_SECONDS + 5
        other.wait_for_timeout(100)
    assert 9 < time.monotonic() - closed <= CLOSED_SECONDS


@pytest.mark.parametrize("settings", [{}, SIGNED_IN], ids=["anonymous", "with-a-token"])
def test_a_reloaded_page_keeps_its_call(visit: OpenVisit, oneinbox: str, settings: dict[str, str]) -> None:
    options = f"{{ token: async () => {signed_in()} }}" if settings else ""
    there = visit(options, LOST, **settings)
    url = there.run(FOLLOWED)
    hold(oneinbox, url)
    before = starts(oneinbox)
    there.page.reload()
    there.page.evaluate(OPEN % options, there.url)
    assert there.run("window.call = await broker.resume(); return call.url;") == url
    there.page.wait_for_timeout(CLOSED_SECONDS * 1000)
    assert call_of(oneinbox, url)["status"] == "in_progress"
    there.run("await call.rejoin(); await call.hangUp();")
    assert call_of(oneinbox, url)["status"] == "completed"
    assert starts(oneinbox) == before
    assert there.run("return broker.resume();") is None


@pytest.mark.parametrize("waits", ["for the answer", "for the broker"])
def test_a_page_that_is_left_again_while_it_resumes_hangs_up(visit: OpenVisit, oneinbox: str, waits: str) -> None:
    there = visit(complaints=LOST)
    url = there.run(FOLLOWED)
    hold(oneinbox, url)
    there.page.reload()
    there.page.evaluate(OPEN % "", there.url)
    asked: list[Route] = []

    def hold_back(route: Route) -> None:
        if waits == "for the answer":  # the broker has taken its stop back
            route.fetch()
        asked.append(route)

    there.page.route("**/calls/*", hold_back)
    there.run("void broker.resume();")
    there.wait_for(lambda: bool(asked))
    there.page.unroute_all()
    there.page.goto("about:blank")
    there.wait_for(lambda: call_of(oneinbox, url)["status"] == "completed")


def test_a_token_that_does_not_say_when_it_expires_can_be_resumed(visit: OpenVisit, oneinbox: str) -> None:
    there = visit(complaints=LOST)

    def without_exp(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json=answer.json() | {"participant_token": "e30.e30.x"})

    there.page.route("**/session", without_exp)
    url = there.run(FOLLOWED)
    hold(oneinbox, url)
    there.page.reload()
    there.page.evaluate(OPEN % "", there.url)
    assert there.run("window.call = await broker.resume(); return call.url;") == url
    there.run("await call.hangUp();")


def test_a_duplicated_tab_does_not_take_the_call(visit: OpenVisit) -> None:
    there = visit(complaints=LOST)
    there.run("window.call = await broker.start();")
    with there.page.context.expect_page() as opened:
        there.page.evaluate("void window.open(location.href)")
    other = opened.value
    other.wait_for_load_state()
    other.evaluate(OPEN % "", there.url)
    assert other.evaluate("broker.resume()") is None
    other.close()
    there.run("await call.hangUp();")


def test_a_call_that_ended_meanwhile_is_not_resumed(visit: OpenVisit) -> None:
    there = visit(complaints=LOST)
    there.run("window.call = await broker.start();")
    call = there.calls()[0]["id"]
    there.page.goto("about:blank")
    control(there.oneinbox, f"calls/{call}", {"status": "completed"})
    there.page.wait_for_timeout(1100)  # reads ask OneInbox once a second
    there.page.go_back()
    there.page.evaluate(OPEN % "", there.url)
    assert there.run("return broker.resume();") is None
