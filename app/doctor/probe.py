"""Probes of a deployed broker: does it refuse what it must? Asked from outside, without its settings.

No probe can start a call, however the broker and its proxy are set up. Only a server that has shown that it is a broker
gets more than a GET, and every other request carries a body that all brokers refuse (REFUSED), with two exceptions:
TRACE must not have a body (RFC 9110, section 9.3.8) and goes to another route; a preflight has none by its nature.
"""

import asyncio
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal
from urllib.parse import urlsplit

import httpx
import jwt

from app.config.settings import SettingsError, is_loopback
from app.config.surroundings import surroundings_mistakes
from app.doctor.findings import DEADLINE, Finding, fine, warning, within, wrong
from app.doctor.http_client import Answer, Client

JSON = {"Content-Type": "application/json"}
REFUSED = {"room_name": "probe", "room_config": "none", "agent": 0}
"""Three mistakes, each a 422 under any settings: OneInbox assigns the room, and the types are wrong."""
BODY = json.dumps(REFUSED).encode()
TOO_LARGE = json.dumps(REFUSED | {"room_name": "x" * 17 * 1024}).encode()

USER_HEADERS = (
    *("X-Forwarded-User", "X-Forwarded-Email", "X-Forwarded-Preferred-Username", "X-Auth-Request-User"),
    *("X-Auth-Request-Email", "X-Remote-User", "Remote-User", "X-User", "X-User-Id", "X-WebAuth-User"),
)
ADDRESS_HEADERS = (
    *("X-Forwarded-For", "X-Real-IP", "X-Client-IP", "True-Client-IP", "CF-Connecting-IP", "Fly-Client-IP"),
    "DO-Connecting-IP",
)
ODD_IDS = ("../x", "%2e%2e", "%2e%2e%2fx", "a" * 129, "web", "cursor", "a%00b", "%ff%fe", "x.y", "..;/x")
ALWAYS_SENT = (
    *("cache-control", "content-security-policy", "referrer-policy", "x-content-type-options", "x-request-id"),
)
REMAINING = re.compile(r";r=([0-9]{1,9})\b")
INCONCLUSIVE = frozenset({0, 429, 503})
"""No answer, too many requests, paused: these say nothing about the probe."""

CHECK_LOG = "check the broker's log"
CHECK_PROXY = "check the proxy"
CHECK_SIZE = "check the proxy: the broker refuses more than 16 KiB"
ONLY_THE_PROXY = "name only the proxy in BROKER_TRUSTED_PROXIES; a probe from a trusted proxy's own address is believed"

Mode = Literal["anonymous", "jwt", "header", ""]


@dataclass(frozen=True, slots=True)
class Deployment:
    """A broker, and its first answers.

    `mode`: how it tells users apart; empty if unclear. `listed`: the answer to GET /calls without an identity.
    `posted`: the answer to POST /session with REFUSED. `origin_headers`: those that pass its Origin
    check; None if unknown.
    """

    client: Client
    mode: Mode
    listed: Answer
    posted: Answer
    origin_headers: Mapping[str, str] | None

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        """GET, without an identity."""
        return await self.client.request("GET", path, headers)

    async def post(
        self, content: bytes = BODY, headers: Mapping[str, str] | None = None, *, chunked: bool = False
    ) -> Answer:
        """POST /session with a body that is refused."""
        given = {**JSON, **(self.origin_headers or {}), **(headers or {})}
        return await self.client.request("POST", "/session", given, content, chunked=chunked)


async def probe(
    url: str, *, transport: httpx.AsyncBaseTransport | None = None, deadline: float = DEADLINE
) -> list[Finding]:
    """Run all probes within `deadline` seconds; return their findings in a fixed order.

    `url`: the broker's public http(s) URL, with its prefix. `transport` replaces the connection.
    """
    try:
        if lines := surroundings_mistakes():
            raise SettingsError(lines)
        client = Client(url.rstrip("/"), transport)
    except SettingsError as error:
        return [wrong("surroundings", line, "correct it in the environment") for line in error.lines]
    try:
        return await within(deadline, lambda: _probe(client, deadline), ["probe"])
    finally:
        await client.aclose()


async def _probe(client: Client, deadline: float) -> list[Finding]:
    ends_at = asyncio.get_running_loop().time() + deadline
    is_broker = await _is_broker(client)
    if not is_broker.ok:
        return [is_broker]
    broker = await _meet(client)
    left = 0.9 * (ends_at - asyncio.get_running_loop().time())  # so that each reports its own timeout

    async def run(name: str) -> list[Finding]:
        return [await PROBES[name](broker, name)]

    found = await asyncio.gather(*(within(left, partial(run, name), [name]) for name in PROBES))
    return [is_broker, *(finding for findings in found for finding in findings)]


async def _is_broker(client: Client) -> Finding:
    """Look for a page that only brokers have. A server without it gets no other request."""
    name, slug = "broker", "forbidden-origin"
    answer = await client.request("GET", f"/problems/{slug}")
    if not answer.status:
        return wrong(name, f"cannot be reached: {answer}", "check the URL, DNS and the firewall")
    if 300 <= answer.status < 400:
        return wrong(
            name,
            f"answers {answer.status}, a redirect, which is not followed",
            "give the URL that it leads to; a broker behind a sign-in page cannot be probed from outside",
        )
    if answer.status != 200 or not isinstance(answer.body, dict) or answer.body.get("slug") != slug:
        return wrong(
            name,
            f"this is not a broker: it answers GET /problems/{slug} with {answer.status}",
            "give the broker's public URL, with its prefix if it has one",
        )
    return fine(name, "found")


async def _meet(client: Client) -> Deployment:
    listed = await client.request("GET", "/calls")
    mode: Mode = ""
    if listed.status == 401:
        mode = "jwt" if listed.headers.get("www-authenticate", "").lower().startswith("bearer") else "header"
    elif listed.status == 404:
        mode = "anonymous"
    parts = urlsplit(client.base_url)
    same_site = {"Sec-Fetch-Site": "same-origin"}
    # It may require an Origin; its own is the one that can be guessed.
    for origin in (same_site, {**same_site, "Origin": f"{parts.scheme}://{parts.netloc.lower()}"}):
        posted = await client.request("POST", "/session", {**JSON, **origin}, BODY)
        if posted.slug != "forbidden-origin":
            return Deployment(client, mode, listed, posted, origin)
    return Deployment(client, mode, listed, posted, None)


def _inconclusive(name: str, answer: Answer) -> Finding | None:
    """Return a warning if this answer says nothing about the probe."""
    if answer.status in INCONCLUSIVE or answer.slug == "blocked":
        return warning(name, f"inconclusive: {answer}", "probe again in a minute")
    return None


def _refusal(name: str, answers: Sequence[Answer], expected: Collection[int], meaning: str, remedy: str) -> Finding:
    """Check that all answers are refusals. `meaning`: of one that is not."""
    for answer in answers:
        if answer.status in expected:
            continue
        if answer.slug == "forbidden-origin":
            return warning(name, "inconclusive: it needs an Origin the probe cannot guess")
        return _inconclusive(name, answer) or wrong(name, f"{meaning}: {answer}", remedy)
    return fine(name, f"refused: {', '.join(sorted({str(answer) for answer in answers}))}")


# Origins


async def _forged_origin(broker: Deployment, name: str) -> Finding:
    host = urlsplit(broker.client.base_url).hostname or ""
    stranger = f"probe-{secrets.token_hex(4)}.invalid"
    remedy = "list your own sites in BROKER_ALLOWED_ORIGINS, and let no proxy add Access-Control headers"
    findings = await asyncio.gather(
        _origin(broker, name, {"Origin": f"https://{stranger}", "X-Forwarded-Host": stranger}, remedy),
        # A careless comparison takes this for the broker's own.
        _origin(broker, name, {"Origin": f"https://{host.strip('[]').replace(':', '-')}.{stranger}"}, remedy),
    )
    return next((finding for finding in findings if finding.level != "ok"), findings[0])


async def _null_origin(broker: Deployment, name: str) -> Finding:
    remedy = "update the broker, which always refuses it, and let no proxy add Access-Control headers"
    return await _origin(broker, name, {"Origin": "null"}, remedy)


async def _origin(broker: Deployment, name: str, headers: dict[str, str], remedy: str) -> Finding:
    preflight = {**headers, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answers = await asyncio.gather(
        broker.client.request("POST", "/session", {**JSON, **headers}, BODY),
        broker.get("/readyz", headers),
        broker.client.request("OPTIONS", "/session", preflight),
    )
    for answer in answers:
        if "access-control-allow-origin" in answer.headers:
            return wrong(name, f"pages of any site can read its answers: {answer}, with CORS headers", remedy)
    return _refusal(name, answers, {403}, "pages of any site can use it", remedy)


# Identity


async def _no_identity(broker: Deployment, name: str) -> Finding:
    listed, posted = broker.listed, broker.posted
    if listed.status == 200:
        return wrong(name, "GET /calls lists a user's calls without a login", "check BROKER_AUTH and the proxy")
    if broker.mode == "anonymous":
        return warning(
            name,
            "anonymous: anyone who reaches it can start calls, up to the limits",
            "set BROKER_AUTH=jwt if your users sign in, or BROKER_CHALLENGE_SECRET",
        )
    if not broker.mode:
        return _inconclusive(name, listed) or wrong(name, f"GET /calls is answered with {listed}", CHECK_LOG)
    return _refusal(name, [listed, posted], {401, 403}, "POST /session reads the body without a login", CHECK_PROXY)


async def _forged_identity(broker: Deployment, name: str) -> Finding:
    claims = {"sub": "probe", "exp": 4_000_000_000}
    weak = "secret".ljust(32, "!")
    for token in (jwt.encode(claims, "", "none"), jwt.encode(claims, weak, "HS256"), secrets.token_urlsafe(32)):
        login = {"Authorization": "Bearer " + token}
        if finding := await _login_works(broker, name, login, "check the settings BROKER_JWT_…"):
            return finding
    return fine(name, f"made-up tokens change nothing: {broker.listed}")


async def _forged_user(broker: Deployment, name: str) -> Finding:
    for headers in (USER_HEADERS, (*USER_HEADERS, "X_Forwarded_User")):
        login = dict.fromkeys(headers, "probe")
        if finding := await _login_works(
            broker, name, login, f"let the proxy remove these headers, and {ONLY_THE_PROXY}"
        ):
            return finding
    return fine(name, f"changes nothing: {broker.listed}")


async def _login_works(broker: Deployment, name: str, headers: dict[str, str], remedy: str) -> Finding | None:
    """Return a finding if these headers make a difference, or if that is unclear."""
    listed, posted = await broker.get("/calls", headers), await broker.post(headers=headers)
    if listed.status == 200:
        return wrong(name, "GET /calls is answered as if a user had signed in", remedy)
    if broker.mode in ("jwt", "header") and posted.status == 422:
        return wrong(name, f"POST /session is answered as if a user had signed in: {posted}", remedy)
    return _inconclusive(name, listed) or _inconclusive(name, posted)


async def _forged_address(broker: Deployment, name: str) -> Finding:
    """Look at what RateLimit says is left: another address in a header must not have its own limits."""
    if broker.mode != "anonymous":
        return fine(name, "limits are per user here")

    async def left(headers: Sequence[tuple[str, str]]) -> int | None:
        found = REMAINING.search((await broker.client.request("GET", "/calls", headers)).headers.get("ratelimit", ""))
        return int(found[1]) if found else None

    plain = [await left([]) for _ in range(3)]
    addresses = [f"198.51.100.{number}" for number in secrets.SystemRandom().sample(range(1, 255), 3)]
    once = [
        await left([*((header, address) for header in ADDRESS_HEADERS), ("Forwarded", f"for={address}")])
        for address in addresses
    ]
    # A proxy may append to the first line only, so that the last one is the client's own.
    twice = [await left([("X-Forwarded-For", address)] * 2) for address in addresses]
    for spoofed, how in ((once, "an address header"), (twice, "a second X-Forwarded-For line")):
        if _falls(plain) and None not in spoofed and len(set(spoofed)) == 1:
            return wrong(
                name,
                f"anyone who writes another address into {how} gets fresh limits",
                f"let the proxy overwrite the header, or append to X-Forwarded-For; {ONLY_THE_PROXY}",
            )
    if _falls(once) and _falls(twice):
        return fine(name, "changes nothing: the same limits count on")
    return warning(name, "inconclusive: RateLimit is missing, or several processes count separately")


def _falls(numbers: Sequence[int | None]) -> bool:
    known = [number for number in numbers if number is not None]
    return len(known) == len(numbers) and all(one > other for one, other in pairwise(known))


# Requests


async def _odd_ids(broker: Deployment, name: str) -> Finding:
    answers = await asyncio.gather(*(broker.get(f"/calls/{each}") for each in ODD_IDS))
    refused = set(range(300, 500)) - INCONCLUSIVE  # a proxy may redirect to the normalized path
    return _refusal(
        name, answers, refused, "an odd id was accepted", "check the broker's log, and the proxy's rewriting"
    )


async def _large_body(broker: Deployment, name: str, *, chunked: bool = False) -> Finding:
    answer = await broker.post(TOO_LARGE, chunked=chunked)
    refused = {413, 411, 401} if chunked else {413, 401}
    return _refusal(name, [answer], refused, "17 KiB is accepted", CHECK_SIZE)


async def _content_type(broker: Deployment, name: str) -> Finding:
    # A page of another site can send this without a preflight.
    answer = await broker.post(headers={"Content-Type": "text/plain"})
    return _refusal(
        name, [answer], {415, 401}, "text/plain is read as JSON", f"{CHECK_PROXY}: the broker takes JSON only"
    )


async def _methods(broker: Deployment, name: str) -> Finding:
    answers = await asyncio.gather(
        broker.client.request("TRACE", "/healthz"),
        broker.client.request("PROBE", "/healthz"),
        broker.client.request("PUT", "/session", {**JSON, **(broker.origin_headers or {})}, BODY),
    )
    refused = {400, 401, 403, 404, 405, 501}
    return _refusal(name, answers, refused, "accepted", f"{CHECK_PROXY}: the broker refuses them")


async def _webhook(broker: Deployment, name: str) -> Finding:
    answer = await broker.client.request("POST", f"/webhooks/oneinbox/{secrets.token_urlsafe(32)}", JSON, BODY)
    return _refusal(name, [answer], {401, 403, 404, 405}, "a made-up secret is accepted", "check the proxy's rewriting")


# Answers


async def _security_headers(broker: Deployment, name: str) -> Finding:
    for answer in await asyncio.gather(broker.get("/readyz"), broker.get("/no-such-route")):
        if finding := _inconclusive(name, answer):
            return finding
        missing = [header for header in ALWAYS_SENT if header not in answer.headers]
        if "no-store" not in answer.headers.get("cache-control", "no-store"):
            missing.append("cache-control: no-store")
        if missing:
            return wrong(name, f"missing: {', '.join(missing)}", "let the proxy pass them on: the broker sends them")
    return fine(name, "present")


async def _metrics(broker: Deployment, name: str) -> Finding:
    answer = await broker.get("/metrics")
    return _refusal(name, [answer], {401, 403, 404}, "open to everyone", "do not publish /metrics")


async def _healthz(broker: Deployment, name: str) -> Finding:
    answer = await broker.get("/healthz")
    if answer.status == 404 and (await broker.get("/readyz")).status == 200:
        return warning(name, "not the broker's answer: a platform, such as Cloud Run, keeps the path", "ask /readyz")
    return fine(name, "ok") if answer.status == 200 else wrong(name, f"answered {answer}", CHECK_LOG)


async def _readyz(broker: Deployment, name: str) -> Finding:
    answer = await broker.get("/readyz")
    match answer.status, answer.body:
        case 200, {"status": "ok"}:
            return fine(name, "ok")
        case 200, {"status": "degraded"}:
            return warning(name, "degraded: its store is unreachable, and each process counts for itself", CHECK_LOG)
        case 503, {"status": "draining"}:
            return warning(name, "draining: it is shutting down", "probe again when it has been replaced")
    return wrong(name, f"answered {answer}", CHECK_LOG)


async def _https(broker: Deployment, name: str) -> Finding:
    parts = urlsplit(broker.client.base_url)
    if parts.scheme == "http":
        if is_loopback(parts.hostname or ""):
            return fine(name, "not needed on loopback")
        return warning(
            name,
            "plain http: anyone on the network path can read tokens and take over calls",
            "put a proxy with TLS in front, and give its https URL",
        )
    if parts.port in (None, 443):
        plain = f"http://{parts.netloc.removesuffix(':443')}"
        answer = await broker.client.request("GET", "/healthz", base_url=plain)
        if 200 <= answer.status < 300:
            return warning(name, "in use, but plain http is answered too", "have the proxy redirect http to https")
    return fine(name, "in use")


PROBES: dict[str, Callable[[Deployment, str], Awaitable[Finding]]] = {
    "https": _https,
    "healthz": _healthz,
    "readyz": _readyz,
    "forged Origin": _forged_origin,
    "Origin null": _null_origin,
    "no identity": _no_identity,
    "forged identity": _forged_identity,
    "forged user header": _forged_user,
    "forged address header": _forged_address,
    "odd ids": _odd_ids,
    "large body": _large_body,
    "large chunked body": partial(_large_body, chunked=True),
    "other content type": _content_type,
    "other methods": _methods,
    "forged webhook": _webhook,
    "security headers": _security_headers,
    "metrics": _metrics,
}
