"""The recipes of app/client and the page in README.md, as they are: in Chromium, on another origin than the broker's.

Only the broker's address in them is replaced. The stand-in for LiveKit's server accepts connections and sends nothing.
"""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import jwt
import pytest
from playwright.sync_api import Dialog, Page, Request, Route, expect

from app.problems import KINDS
from tests.documents import blocks
from tests.e2e.conftest import OpenPage, control, running_broker, running_site
from tests.support.needs import NODE_MODULES, node
from tests.support.processes import ROOT

pytestmark = pytest.mark.browser

PRINTED_BROKER = "http://127.0.0.1:8000"
RECIPES = ROOT / "app/client/recipes"
ORIGINS = {"BROKER_ALLOWED_ORIGINS": "http://127.0.0.1:*"}
LIVEKIT = "127.0.0.1:7880"
"""Where the emulator sends participants."""
JWT_SECRET = "a secret of tests, 32 characters or more"
PACKAGES = ("@livekit/components-react", "@types/react", "esbuild", "livekit-client", "react-dom", "typescript")

PLAIN_PAGE = """
import * as broker from "./broker.js";
import * as patiently from "./patiently.js";
import * as follow from "./follow.js";
import * as followWithToken from "./follow-with-token.js";
import * as livekit from "./livekit.js";
import * as oneinbox from "./oneinbox.ts";
Object.assign(window, broker, patiently, follow, followWithToken, { livekit, oneinbox });
"""
REACT_PAGE = """
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { Talk } from "./Talk.jsx";
createRoot(document.querySelector("main")).render(<StrictMode><Talk /></StrictMode>);
"""
FIRST_PAGE = """
document.querySelector("main").innerHTML = '<button id="talk">Talk</button>';
"""
"""What README.md's page needs besides what is printed there. `import` comes first wherever it stands."""
NAIVE_PAGE = """
import { createRoot } from "react-dom/client";
import { TokenSource } from "livekit-client";
import { useSession } from "@livekit/components-react";
const source = TokenSource.endpoint("http://127.0.0.1:8000/session");
function Naive() {
  const session = useSession(source);
  return <button onClick={() => session.end()}>Hang up</button>;
}
createRoot(document.querySelector("main")).render(<Naive />);
"""
HTML = """<!doctype html><meta charset="utf-8"><title>{0}</title><link rel="icon" href="data:,">
<main></main><script type="module" src="{0}.js"></script>"""
WEB_SDK = """
declare module "@oneinbox/web-sdk" {
  export class OneInbox {
    start(options: { token: string; serverUrl: string }): Promise<void>;
  }
}
"""
"""OneInbox's documentation of its Web SDK, as far as the recipe uses it: the package is not on the public registry."""


def write_recipes(folder: Path) -> None:
    for path in RECIPES.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "node_modules").symlink_to(NODE_MODULES)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Pages at an origin of their own.

    `plain.html` and `react.html` have the recipes, `first.html` README's page, and `naive.html` neither.
    """
    program = node(*PACKAGES)
    folder = tmp_path_factory.mktemp("site")
    write_recipes(folder)
    [printed] = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "js")
    pages = {"plain": PLAIN_PAGE, "react": REACT_PAGE, "first": FIRST_PAGE + printed, "naive": NAIVE_PAGE}
    for name, text in pages.items():
        source = f"{name}.in.jsx"
        (folder / source).write_text(text, encoding="utf-8")
        (folder / f"{name}.html").write_text(HTML.format(name), encoding="utf-8")
        options = ("--bundle", "--format=esm", "--jsx=automatic", "--log-level=warning", f"--outfile={name}.js")
        command = [program, str(NODE_MODULES / "esbuild/bin/esbuild"), source, *options]
        subprocess.run(command, cwd=folder, check=True, timeout=120)
    with running_site(folder) as origin:
        yield origin


@dataclass
class Visit:
    """A page with the recipes, and the requests it sent."""

    page: Page
    posts: list[Request] = field(default_factory=list)
    """Of POST /session."""
    stops: list[str] = field(default_factory=list)
    """Calls that were hung up."""
    rooms: list[str] = field(default_factory=list)
    """Rooms that LiveKit's client wanted to join."""

    def watch(self) -> None:
        """Record requests from now on, and accept LiveKit's connections."""

        def on_request(request: Request) -> None:
            if request.method == "POST" and request.url.endswith("/session"):
                self.posts.append(request)
            if request.method == "POST" and request.url.endswith("/stop"):
                self.stops.append(request.url.removesuffix("/stop"))

        self.page.on("request", on_request)
        self.page.route(
            f"http://{LIVEKIT}/**", lambda route: route.fulfill(headers={"Access-Control-Allow-Origin": "*"})
        )
        self.page.route_web_socket(
            re.compile(f"^ws://{LIVEKIT}/"), lambda socket: self.rooms.append(room_of(token_in(socket.url)))
        )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Let the page run until the condition holds."""
        for _ in range(600):
            if condition():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"{self.posts=} {self.stops=} {self.rooms=}")

    @property
    def locations(self) -> list[str]:
        """The addresses of the calls that were started."""
        base = self.posts[0].url.removesuffix("/session")
        return [base + response.headers["location"] for post in self.posts if (response := post.response())]


def token_in(url: str) -> str:
    """The participant token in the address that LiveKit's client connects to."""
    found = re.search(r"access_token=([^&]+)", url)
    assert found is not None, url
    return found[1]


def room_of(token: str) -> str:
    """The room a participant token is for."""
    room: str = jwt.decode(token, options={"verify_signature": False})["video"]["room"]
    return room


@pytest.fixture(scope="module")
def broker(oneinbox: str) -> Iterator[str]:
    with running_broker(oneinbox, **ORIGINS) as (_, url):
        yield url


OpenRecipes = Callable[..., Visit]


@pytest.fixture
def open_recipes(open_page: OpenPage, site: str, broker: str, oneinbox: str) -> Iterator[OpenRecipes]:
    """Open a page with the recipes: `open_recipes("plain")`; with settings, in front of its own broker."""
    with ExitStack() as stack:

        def opens(name: str, complaints_expected: str | None = None, **settings: str) -> Visit:
            url = stack.enter_context(running_broker(oneinbox, **ORIGINS, **settings))[1] if settings else broker
            visit = Visit(open_page(complaints_expected=complaints_expected))

            def with_its_address(route: Route) -> None:
                answer = route.fetch()
                route.fulfill(response=answer, body=answer.text().replace(PRINTED_BROKER, url))

            visit.page.route("**/*.js", with_its_address)
            visit.watch()
            visit.page.goto(f"{site}/{name}.html")
            visit.page.wait_for_load_state("networkidle")
            stack.callback(visit.page.goto, "about:blank")  # before a broker goes: no stream is cut
            return visit

        yield opens


def starts(oneinbox: str) -> int:
    """The number of calls that OneInbox was ever asked for."""
    return sum(each["path"] == "/v1/calls/web" for each in control(oneinbox, "requests"))


@pytest.mark.parametrize("document", ["README.md", "app/client/README.md"])
def test_the_tag_talks_in_the_sandbox(document: str, open_page: OpenPage, sandbox: str, tmp_path: Path) -> None:
    """It is a whole page, of another origin than the broker's, as app/client/README.md has it in three steps."""
    [tag] = blocks((ROOT / document).read_text(encoding="utf-8"), "html")
    icon = '<link rel="icon" href="data:,">'  # else the browser asks for one, and complains
    page_text = tag.replace(PRINTED_BROKER, sandbox).replace("<script", f"{icon}<script", 1)
    (tmp_path / "page.html").write_text(page_text, encoding="utf-8")
    with running_site(tmp_path) as origin:
        page = open_page(f"{origin}/page.html")
        page.get_by_role("button", name="Talk").click()
        expect(page.get_by_role("button", name="Hang up")).to_be_visible(timeout=20_000)
        page.get_by_role("button", name="Hang up").click()
        expect(page.get_by_role("button", name="Talk again")).to_be_visible(timeout=20_000)


LIVEKIT_CLIENT = {"BROKER_LIVEKIT_CLIENT": str(NODE_MODULES / "livekit-client/dist/livekit-client.esm.mjs")}


def test_the_page_of_the_readme(open_recipes: OpenRecipes) -> None:
    visit = open_recipes("first", "", **LIVEKIT_CLIENT)
    assert visit.posts == []
    visit.page.get_by_role("button", name="Talk").click()
    visit.wait_for(lambda: len(visit.rooms) == 1)
    assert visit.stops == []
    visit.wait_for(lambda: set(visit.stops) == set(visit.locations))  # LiveKit's client gives up after 15 s of silence
    assert len(visit.posts) == 1


def test_the_page_of_the_readme_shows_a_refusal(open_recipes: OpenRecipes) -> None:
    visit = open_recipes("first", "status of 429", BROKER_SESSION_LIMITS="1/hour", **LIVEKIT_CLIENT)
    told: list[str] = []

    def on_dialog(dialog: Dialog) -> None:
        told.append(dialog.message)
        dialog.dismiss()

    visit.page.on("dialog", on_dialog)
    talk = visit.page.get_by_role("button", name="Talk")
    talk.click()
    visit.wait_for(lambda: len(visit.rooms) == 1)
    talk.click()
    visit.wait_for(lambda: told[-1:] == [KINDS["rate-limited"].title])  # the first one could not be joined


def test_plain_fetch(open_recipes: OpenRecipes) -> None:
    page = open_recipes("plain").page
    started = page.evaluate("startCall({ variables: { customer_name: 'Ada' }, metadata: { page: '/pricing' } })")
    assert started.keys() == {"server_url", "participant_token", "call"}
    assert started["server_url"] == f"ws://{LIVEKIT}"
    assert room_of(started["participant_token"])
    assert page.evaluate("async (call) => (await (await fetch(call)).json()).status", started["call"]) == "queued"
    page.evaluate("hangUp", started["call"])
    assert page.evaluate("async (call) => (await (await fetch(call)).json()).end_reason", started["call"])


def test_plain_fetch_says_what_is_wrong(open_recipes: OpenRecipes) -> None:
    page = open_recipes("plain", "the server responded with a status of 4", BROKER_SESSION_LIMITS="1/hour").page
    caught = "startCall(%s).catch((error) => ({ ...error, message: error.message }))"
    refused = page.evaluate(caught % "{ room_name: 'mine' }")
    assert (refused["status"], refused["retryAfter"]) == (422, None)
    assert refused["type"].endswith("/problems/invalid-request")
    assert refused["message"] == refused["title"]
    page.evaluate("startCall()")
    limited = page.evaluate(caught % "")
    assert limited["status"] == 429
    assert 3000 < limited["retryAfter"] <= 3600
    assert page.evaluate("problemOf(new Response('<html>', { status: 502 }))") is not None


def test_asking_patiently(open_recipes: OpenRecipes) -> None:
    visit = open_recipes("plain", "status of 429", BROKER_SESSION_LIMITS="1/second")
    visit.page.evaluate("startCall()")
    visit.page.evaluate("startCallPatiently()")
    answers = [response.status for post in visit.posts if (response := post.response())]
    assert sorted(set(answers)) in ([201], [201, 429])
    assert answers[-1] == 201
    assert len({post.headers.get("idempotency-key") for post in visit.posts[1:]}) == 1


def test_waiting_too_long_is_no_patience(open_recipes: OpenRecipes) -> None:
    visit = open_recipes("plain", "status of 429", BROKER_SESSION_LIMITS="1/hour")
    visit.page.evaluate("startCall()")
    assert visit.page.evaluate("startCallPatiently().catch((error) => error.status)") == 429
    assert len(visit.posts) == 2


def test_a_lost_answer_starts_no_second_call(open_recipes: OpenRecipes, oneinbox: str) -> None:
    visit = open_recipes("plain", "ERR_FAILED")
    before = starts(oneinbox)
    lost: list[str] = []

    def lose_the_first(route: Route) -> None:
        if route.request.method == "POST" and not lost:
            lost.append(route.fetch().json()["participant_token"])
            route.abort()
        else:
            route.continue_()

    visit.page.route("**/session", lose_the_first)
    started = visit.page.evaluate("startCallPatiently()")
    assert [started["participant_token"]] == lost
    assert starts(oneinbox) == before + 1


FOLLOW = """async (call) => {
  const seen = [];
  await new Promise((resolve, reject) => {
    follow(call, (state) => seen.push(state.status) && state.ended_at && resolve(), reject);
    setTimeout(() => hangUp(call), 500);
  });
  return seen;
}"""


def test_following(open_recipes: OpenRecipes) -> None:
    page = open_recipes("plain").page
    seen = page.evaluate(FOLLOW, page.evaluate("startCall()")["call"])
    assert seen[0] == "queued"
    assert seen[-1] == "completed"


def test_following_what_is_not_there(open_recipes: OpenRecipes) -> None:
    page = open_recipes("plain", "status of 404").page
    call = page.evaluate("startCall()")["call"] + "x"
    assert (
        page.evaluate("(call) => new Promise((resolve) => follow(call, resolve, () => resolve('lost')))", call)
        == "lost"
    )


def with_login(user: str = "ada", *, life: int = 600) -> dict[str, str]:
    token = jwt.encode({"sub": user, "exp": int(time.time()) + life}, JWT_SECRET, "HS256")
    return {"Authorization": f"Bearer {token}"}


FOLLOW_WITH_TOKEN = """async (headers) => {
  const seen = [];
  login.headers = async () => headers;
  const { call } = await startCall();
  setTimeout(() => hangUp(call), 500);
  await followWithToken(call, (state) => seen.push(state));
  return seen;
}"""


def test_following_with_a_token(open_recipes: OpenRecipes) -> None:
    page = open_recipes("plain", BROKER_AUTH="jwt", BROKER_JWT_SECRET=JWT_SECRET).page
    seen = page.evaluate(FOLLOW_WITH_TOKEN, with_login())
    assert seen[0]["status"] == "queued"
    assert seen[-1]["status"] == "completed"


def test_following_with_a_token_goes_on_where_a_stream_was_closed(open_recipes: OpenRecipes) -> None:
    """A stream lasts as long as its token: here 3 s, of a call that goes on for 6."""
    visit = open_recipes("plain", BROKER_AUTH="jwt", BROKER_JWT_SECRET=JWT_SECRET)
    streams: list[Request] = []
    visit.page.on("request", lambda request: streams.append(request) if request.url.endswith("/events") else None)
    script = """async ([long, short]) => {
      const logins = [long, short], seen = [];
      login.headers = async () => logins.shift() ?? long;
      const { call } = await startCall();
      setTimeout(() => hangUp(call), 6000);
      await followWithToken(call, (state) => seen.push(state.status));
      return seen;
    }"""
    seen = visit.page.evaluate(script, [with_login(), with_login(life=3)])
    assert seen[-1] == "completed"
    gets = [request for request in streams if request.method == "GET"]
    assert len(gets) == 2
    assert "last-event-id" in gets[1].all_headers()


def test_following_with_a_token_says_who_may_not(open_recipes: OpenRecipes) -> None:
    page = open_recipes("plain", "status of 40", BROKER_AUTH="jwt", BROKER_JWT_SECRET=JWT_SECRET).page
    script = "async (headers) => { login.headers = async () => headers; return (await startCall()).call; }"
    call = page.evaluate(script, with_login())
    script = """([call, headers]) => {
      login.headers = async () => headers;
      return followWithToken(call, () => {}).catch((error) => error.status);
    }"""
    assert page.evaluate(script, [call, with_login("eve")]) == 404
    assert page.evaluate(script, [call, {"Authorization": "Bearer none"}]) == 401


def test_following_with_a_cookie(open_recipes: OpenRecipes) -> None:
    settings = {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": JWT_SECRET, "BROKER_JWT_COOKIE": "login"}
    visit = open_recipes("plain", **settings)
    cookie = {"name": "login", "value": with_login()["Authorization"][7:], "domain": "127.0.0.1", "path": "/"}
    visit.page.context.add_cookies([cookie])  # type: ignore[list-item]
    script = """async () => {
      login.credentials = "include";
      const { call } = await startCall();
      const id = await new Promise((resolve, reject) => follow(call, (state) => resolve(state.id), reject));
      await hangUp(call);
      return [call, id];
    }"""
    call, call_id = visit.page.evaluate(script)
    assert call.endswith(f"/calls/{call_id}")


def test_a_page_that_is_closed_hangs_up(open_recipes: OpenRecipes) -> None:
    visit = open_recipes("plain")
    call = visit.page.evaluate("startCall()")["call"]
    script = "(call) => addEventListener('pagehide', () => navigator.sendBeacon(`${call}/stop`))"
    visit.page.evaluate(script, call)
    visit.page.goto("about:blank")
    visit.wait_for(lambda: visit.page.request.get(call).json()["end_reason"] == "api_stop")


def test_oneinbox_web_sdk(open_recipes: OpenRecipes) -> None:
    """With an object of the documented shape: the SDK is not on the public registry."""
    visit = open_recipes("plain")
    script = """async () => {
      const told = [];
      const call = await oneinbox.talk({ start: async (options) => { told.push(options); } });
      return { call, told };
    }"""
    joined = visit.page.evaluate(script)
    [told] = joined["told"]
    assert told.keys() == {"token", "serverUrl"}
    assert room_of(told["token"])
    assert joined["call"] == visit.locations[0]
    failing = (
        "oneinbox.talk({ start: async () => { throw new Error('no microphone'); } }).catch((error) => error.message)"
    )
    assert visit.page.evaluate(failing) == "no microphone"
    assert visit.stops == visit.locations[1:]


def test_livekit_starts_a_call_of_its_own_each_time(open_recipes: OpenRecipes) -> None:
    visit = open_recipes("plain")
    assert visit.posts == []
    options = "{ agentName: 'default', participantAttributes: { plan: 'gold' } }"
    calls = [visit.page.evaluate(f"livekit.newCall({given})") for given in (options, "", "")]
    assert [call["call"] for call in calls] == visit.locations
    assert len({room_of(call["participantToken"]) for call in calls}) == 3
    assert json.loads(visit.posts[0].post_data or "") == {"agent": "default", "variables": {"plan": "gold"}}


def test_livekit_joins_and_hangs_up_what_cannot_be_joined(open_recipes: OpenRecipes) -> None:
    visit = open_recipes("plain", "")
    visit.page.evaluate("void (window.talking = livekit.talk().catch((error) => error.message))")
    visit.wait_for(lambda: len(visit.rooms) == 1)
    assert visit.stops == []
    assert visit.page.evaluate("talking")  # LiveKit's client gives up after 15 s of silence
    assert set(visit.stops) == set(visit.locations)


def test_what_the_document_warns_of(open_recipes: OpenRecipes) -> None:
    """LiveKit's React hook on a source that fetches: a page view is a call, and hanging up starts the next one."""
    visit = open_recipes("naive")
    visit.wait_for(lambda: len(visit.posts) == 1)
    visit.page.get_by_role("button", name="Hang up").click()
    visit.wait_for(lambda: len(visit.posts) == 2)


def test_react(open_recipes: OpenRecipes) -> None:
    """Under StrictMode, which runs every effect twice."""
    visit = open_recipes("react", "user initiated disconnect")
    talk = visit.page.get_by_role("button", name="Talk")
    expect(talk).to_be_visible()
    assert visit.posts == []  # an idle page starts no call

    talk.click()
    expect(visit.page.get_by_text("queued")).to_be_visible()
    visit.wait_for(lambda: len(visit.rooms) >= 1)
    assert len(visit.posts) == 1

    visit.page.get_by_role("button", name="Hang up").click()
    expect(talk).to_be_visible()
    expect(visit.page.get_by_role("alert")).to_be_empty()
    visit.wait_for(lambda: visit.stops == visit.locations)

    first = set(visit.rooms)
    talk.click()
    visit.wait_for(lambda: len(set(visit.rooms)) == 2)
    visit.page.get_by_role("button", name="Hang up").click()
    expect(talk).to_be_visible()
    assert len(first) == 1
    assert len(visit.posts) == 2
    visit.wait_for(lambda: set(visit.stops) == set(visit.locations))


def test_react_shows_a_refusal_and_the_end_of_a_call(open_recipes: OpenRecipes) -> None:
    visit = open_recipes("react", "status of 429|user initiated disconnect", BROKER_SESSION_LIMITS="1/hour")
    talk, alert = visit.page.get_by_role("button", name="Talk"), visit.page.get_by_role("alert")
    talk.click()
    visit.wait_for(lambda: len(visit.rooms) >= 1)
    assert visit.page.request.post(f"{visit.locations[0]}/stop").ok  # not by the page
    expect(alert).to_have_text("The call has ended.")
    talk.click()
    expect(alert).to_have_text(KINDS["rate-limited"].title)
    expect(talk).to_be_enabled()


def test_types(tmp_path: Path) -> None:
    """TypeScript knows every name the recipes use, of OneInbox's Web SDK by its documentation."""
    program = node(*PACKAGES)
    write_recipes(tmp_path)
    (tmp_path / "web-sdk.d.ts").write_text(WEB_SDK, encoding="utf-8")
    given = "--noEmit --skipLibCheck --allowJs --checkJs --jsx react-jsx --target es2023 --module esnext"
    options = [
        *given.split(),
        "--moduleResolution",
        "bundler",
        "web-sdk.d.ts",
        *(path.name for path in RECIPES.iterdir()),
    ]
    command = [program, str(NODE_MODULES / "typescript/bin/tsc"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
