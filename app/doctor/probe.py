"""Does a deployed broker refuse what it must? Asked from outside, without its settings.

No probe can start a call, however the broker and its proxy are set up: whatever is not a GET carries a body that every
broker refuses (REFUSED), and is sent only once the server has shown that it is a broker. TRACE must not carry any (RFC
9110, section 9.3.8), and a preflight does not, so the one goes to another route and the other is what it says.
"""

import asyncio
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal
from urllib.parse import urlsplit

import httpx
import jwt

from app.config.settings import is_loopback
from app.doctor.findings import DEADLINE, Finding, fine, warning, within, wrong
from app.doctor.http_client import Answer, Asker

JSON = {"Content-Type": "application/json"}
REFUSED = {"room_name": "probe", "room_config": "none", "agent": 0}
"""Three mistakes, each a 422 by itself whatever the settings: OneInbox assigns the room, and the types are wrong."""
BODY = json.dumps(REFUSED).encode()
TOO_LARGE = json.dumps(REFUSED | {"room_name": "x" * 17 * 1024}).encode()

USER_HEADERS = (
    *("X-Forwarded-User", "X-Forwarded-Email", "X-Forwarded-Preferred-Username", "X-Auth-Request-User"),
    *("X-Auth-Request-Email", "X-Remote-User", "Remote-User", "X-User", "X-User-Id", "X-WebAuth-User"),
)
ADDRESS_HEADERS = ("X-Forwarded-For", "X-Real-IP", "X-Client-IP", "True-Client-IP", "CF-Connecting-IP")
ODD_IDS = ("../x", "%2e%2e", "%2e%2e%2fx", "a" * 129, "web", "cursor", "a%00b", "%ff%fe", "x.y", "..;/x")
ALWAYS_SENT = (
    *("cache-control", "content-security-policy", "referrer-policy", "x-content-type-options", "x-request-id"),
)
REMAINING = re.compile(r";r=([0-9]{1,9})\b")
UNTOLD = frozenset({0, 429, 503})
"""No answer, too many questions, paused: these say nothing about the question."""

Mode = Literal["anonymous", "jwt", "header", ""]


@dataclass(frozen=True, slots=True)
class Deployment:
    """What the first questions told.

    `mode`: how it tells users apart, as far as it can be told. `listed`: the answer to GET /calls without an identity.
    `posted`: that to POST /session with REFUSED. `passport`: headers with which the Origin check lets a POST through;
    None: nothing did.
    """

    asker: Asker
    mode: Mode
    listed: Answer
    posted: Answer
    passport: dict[str, str] | None

    async def post(self, content: bytes, *, chunked: bool = False, **headers: str) -> Answer:
        """POST /session with a body that is refused."""
        given = {**JSON, **(self.passport or {}), **{name.replace("_", "-"): value for name, value in headers.items()}}
        return await self.asker.ask("POST", "/session", given, content, chunked=chunked)


async def probe(
    url: str, *, transport: httpx.AsyncBaseTransport | None = None, deadline: float = DEADLINE
) -> list[Finding]:
    """All probes, in a fixed order, within `deadline` seconds.

    `url`: the broker's public http(s) URL, with its prefix. `transport` replaces the connection.
    """
    asker = Asker(url.rstrip("/"), transport)
    try:
        return await within(deadline, lambda: _probe(asker, deadline), ["probe"])
    finally:
        await asker.aclose()


async def _probe(asker: Asker, deadline: float) -> list[Finding]:
    ends_at = asyncio.get_running_loop().time() + deadline
    broker = await _is_broker(asker)
    if not broker.ok:
        return [broker]
    deployment = await _meet(asker)
    left = 0.9 * (ends_at - asyncio.get_running_loop().time())  # so that each says for itself that it took too long
    found = await asyncio.gather(*(within(left, partial(each, deployment), [name]) for name, each in PROBES.items()))
    return [broker, *(finding for findings in found for finding in findings)]


async def _is_broker(asker: Asker) -> Finding:
    """By a page that only brokers have. Nothing but this GET goes to a server that is none."""
    name, slug = "broker", "forbidden-origin"
    answer = await asker.ask("GET", f"/problems/{slug}")
    if not answer.status:
        return wrong(name, f"cannot be reached: {answer}", "look at the URL, at DNS and at the firewall")
    if 300 <= answer.status < 400:
        return wrong(
            name,
            f"answers {answer.status}, a redirect, which is not followed",
            "give the URL that it leads to; what a sign-in page stands before cannot be probed from outside",
        )
    if answer.status != 200 or not isinstance(answer.body, dict) or answer.body.get("slug") != slug:
        return wrong(
            name,
            f"this is no broker: GET /problems/{slug} is answered {answer.status}, and not as a broker does",
            "give the broker's public URL, with its prefix if it has one",
        )
    return fine(name, "it is one")


async def _meet(asker: Asker) -> Deployment:
    listed = await asker.ask("GET", "/calls")
    mode: Mode = ""
    if listed.status == 401:
        mode = "jwt" if listed.headers.get("www-authenticate", "").lower().startswith("bearer") else "header"
    elif listed.status == 404:
        mode = "anonymous"
    parts = urlsplit(asker.base_url)
    same_site = {"Sec-Fetch-Site": "same-origin"}
    posted = await asker.ask("POST", "/session", {**JSON, **same_site}, BODY)
    passport: dict[str, str] | None = same_site
    if posted.slug == "forbidden-origin":  # it may want an Origin; its own is the one that can be guessed
        passport = {**same_site, "Origin": f"{parts.scheme}://{parts.netloc.lower()}"}
        posted = await asker.ask("POST", "/session", {**JSON, **passport}, BODY)
        if posted.slug == "forbidden-origin":
            passport = None
    return Deployment(asker, mode, listed, posted, passport)


def _untold(name: str, answer: Answer) -> Finding | None:
    """A finding, when this answer says nothing about what was asked."""
    if answer.status in UNTOLD or answer.slug == "blocked":
        return warning(name, f"could not be told: {answer}", "probe again in a minute")
    return None


def _refusal(name: str, answers: Sequence[Answer], expected: Collection[int], meaning: str, remedy: str) -> Finding:
    """Whether all of these were refused. `meaning`: of one that was not."""
    for answer in answers:
        if answer.status in expected:
            continue
        if answer.slug == "forbidden-origin":
            return warning(name, "could not be told: it wants an Origin that the probe does not know")
        return _untold(name, answer) or wrong(name, f"{meaning}: {answer}", remedy)
    return fine(name, f"refused: {', '.join(sorted({str(answer) for answer in answers}))}")


# Origins


async def _forged_origin(broker: Deployment) -> list[Finding]:
    name = "forged Origin"
    host = urlsplit(broker.asker.base_url).hostname or ""
    stranger = f"probe-{secrets.token_hex(4)}.invalid"
    remedy = "list your own sites in BROKER_ALLOWED_ORIGINS, and let no proxy add Access-Control headers"
    findings = await asyncio.gather(
        _origin(broker, name, f"https://{stranger}", {"X-Forwarded-Host": stranger}, remedy),
        # What a careless comparison takes for the broker's own.
        _origin(broker, name, f"https://{host.strip('[]').replace(':', '-')}.{stranger}", {}, remedy),
    )
    return [next((finding for finding in findings if finding.level != "ok"), findings[0])]


async def _null_origin(broker: Deployment) -> list[Finding]:
    remedy = "update the broker, which never takes it, and let no proxy add Access-Control headers"
    return [await _origin(broker, "Origin null", "null", {}, remedy)]


async def _origin(broker: Deployment, name: str, origin: str, besides: dict[str, str], remedy: str) -> Finding:
    headers = {"Origin": origin, **besides}
    preflight = {**headers, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answers = await asyncio.gather(
        broker.asker.ask("POST", "/session", {**JSON, **headers}, BODY),
        broker.asker.ask("GET", "/healthz", headers),
        broker.asker.ask("OPTIONS", "/session", preflight),
    )
    for answer in answers:
        if "access-control-allow-origin" in answer.headers:
            return wrong(name, f"pages of any site may read its answers: {answer}, with CORS headers", remedy)
    return _refusal(name, answers, {403}, "a page of any site may use it", remedy)


# Who is asking


async def _no_identity(broker: Deployment) -> list[Finding]:
    name, listed, posted = "no identity", broker.listed, broker.posted
    if listed.status == 200:
        return [wrong(name, "GET /calls lists somebody's calls without a login", "look at BROKER_AUTH and the proxy")]
    if broker.mode == "anonymous":
        return [
            warning(
                name,
                "anonymous: whoever reaches it may start calls, as many as the limits let through",
                "set BROKER_AUTH=jwt if your users sign in, or BROKER_CHALLENGE_SECRET",
            )
        ]
    if broker.mode and posted.status not in (401, 403):
        untold = _untold(name, posted)
        return [untold or wrong(name, f"POST /session reads the body without a login: {posted}", "look at the proxy")]
    if not broker.mode:
        return [_untold(name, listed) or wrong(name, f"GET /calls is answered {listed}", "look at the broker's log")]
    return [fine(name, f"refused: {listed}")]


async def _forged_identity(broker: Deployment) -> list[Finding]:
    name = "forged identity"
    claims = {"sub": "probe", "exp": 4_000_000_000}
    weak = "secret".ljust(32, "!")
    tokens = [jwt.encode(claims, "", "none"), jwt.encode(claims, weak, "HS256"), secrets.token_urlsafe(32)]
    for token in tokens:
        login = {"Authorization": "Bearer " + token}
        findings = await _login_changes_nothing(broker, name, login, "look at the settings BROKER_JWT_…")
        if findings:
            return findings
    return [fine(name, f"made-up tokens change nothing: {broker.listed}")]


async def _forged_user(broker: Deployment) -> list[Finding]:
    name = "forged user header"
    remedy = (
        "let the proxy remove these headers, and BROKER_TRUSTED_PROXIES name the proxy only; "
        "a probe from a trusted proxy's own address is believed"
    )
    headers = dict.fromkeys((*USER_HEADERS, "X_Forwarded_User"), "probe")
    findings = await _login_changes_nothing(broker, name, dict.fromkeys(USER_HEADERS, "probe"), remedy)
    findings = findings or await _login_changes_nothing(broker, name, headers, remedy)
    return findings or [fine(name, f"changes nothing: {broker.listed}")]


async def _login_changes_nothing(broker: Deployment, name: str, headers: dict[str, str], remedy: str) -> list[Finding]:
    """A finding, if these headers make a difference, or none could be told."""
    listed = await broker.asker.ask("GET", "/calls", headers)
    posted = await broker.asker.ask("POST", "/session", {**JSON, **(broker.passport or {}), **headers}, BODY)
    if listed.status == 200:
        return [wrong(name, "GET /calls is answered as if somebody had signed in", remedy)]
    if broker.mode in ("jwt", "header") and posted.status == 422:
        return [wrong(name, f"POST /session is answered as if somebody had signed in: {posted}", remedy)]
    untold = _untold(name, listed) or _untold(name, posted)
    return [untold] if untold else []


async def _forged_address(broker: Deployment) -> list[Finding]:
    """Whether another X-Forwarded-For has a budget of its own, by what RateLimit says is left."""
    name = "forged address header"
    if broker.mode != "anonymous":
        return [fine(name, "limits go by user here")]

    async def left(headers: dict[str, str]) -> int | None:
        answer = await broker.asker.ask("GET", "/calls", headers)
        found = REMAINING.search(answer.headers.get("ratelimit", ""))
        return int(found[1]) if found else None

    plain = [await left({}) for _ in range(3)]
    spoofed = [
        await left(_from_address(f"198.51.100.{number}")) for number in secrets.SystemRandom().sample(range(1, 255), 3)
    ]
    if _falls(spoofed):
        return [fine(name, "changes nothing: the same limits count on")]
    if _falls(plain) and None not in spoofed and len(set(spoofed)) == 1:
        return [
            wrong(
                name,
                "whoever writes another address into X-Forwarded-For has limits of their own",
                "let BROKER_TRUSTED_PROXIES name the proxy only, and the proxy append to X-Forwarded-For; "
                "a probe from a trusted proxy's own address is believed",
            )
        ]
    return [
        warning(name, "could not be told from RateLimit: it is missing, or several processes count each for itself")
    ]


def _from_address(address: str) -> dict[str, str]:
    return {**dict.fromkeys(ADDRESS_HEADERS, address), "Forwarded": f"for={address}"}


def _falls(numbers: Sequence[int | None]) -> bool:
    known = [number for number in numbers if number is not None]
    return len(known) == len(numbers) and all(one > other for one, other in pairwise(known))


# What it is asked


async def _odd_ids(broker: Deployment) -> list[Finding]:
    name = "odd ids"
    answers = await asyncio.gather(*(broker.asker.ask("GET", f"/calls/{each}") for each in ODD_IDS))
    refused = {*range(300, 400), *range(400, 500)} - UNTOLD  # a proxy may redirect to the tidy path
    return [_refusal(name, answers, refused, "got somewhere", "look at the broker's log, and at the proxy's rewriting")]


async def _large_body(broker: Deployment) -> list[Finding]:
    answer = await broker.post(TOO_LARGE)
    remedy = "look at the proxy: the broker refuses more than 16 KiB"
    return [_refusal("large body", [answer], {413, 401}, "17 KiB are read", remedy)]


async def _large_chunked_body(broker: Deployment) -> list[Finding]:
    answer = await broker.post(TOO_LARGE, chunked=True)
    remedy = "look at the proxy: the broker refuses more than 16 KiB"
    return [_refusal("large chunked body", [answer], {413, 411, 401}, "17 KiB are read", remedy)]


async def _content_type(broker: Deployment) -> list[Finding]:
    # What a page of another site may send without a preflight.
    answer = await broker.post(BODY, Content_Type="text/plain")
    remedy = "look at the proxy: the broker takes JSON only"
    return [_refusal("other content type", [answer], {415, 401}, "text/plain is taken for JSON", remedy)]


async def _methods(broker: Deployment) -> list[Finding]:
    answers = await asyncio.gather(
        broker.asker.ask("TRACE", "/healthz"),
        broker.asker.ask("PROBE", "/healthz"),
        broker.asker.ask("PUT", "/session", {**JSON, **(broker.passport or {})}, BODY),
    )
    refused = {400, 401, 403, 404, 405, 501}
    return [_refusal("other methods", answers, refused, "taken", "look at the proxy: the broker refuses them")]


async def _webhook(broker: Deployment) -> list[Finding]:
    answer = await broker.asker.ask("POST", f"/webhooks/oneinbox/{secrets.token_urlsafe(32)}", JSON, BODY)
    meaning, remedy = "a made-up secret is taken", "look at the proxy's rewriting"
    return [_refusal("forged webhook", [answer], {401, 403, 404, 405}, meaning, remedy)]


# What it shows


async def _headers(broker: Deployment) -> list[Finding]:
    name = "security headers"
    answers = await asyncio.gather(broker.asker.ask("GET", "/healthz"), broker.asker.ask("GET", "/no-such-route"))
    for answer in answers:
        if untold := _untold(name, answer):
            return [untold]
        missing = [header for header in ALWAYS_SENT if header not in answer.headers]
        if "no-store" not in answer.headers.get("cache-control", "no-store"):
            missing.append("cache-control: no-store")
        if missing:
            return [wrong(name, f"missing: {', '.join(missing)}", "let the proxy pass them on: the broker sends them")]
    return [fine(name, "there")]


async def _metrics(broker: Deployment) -> list[Finding]:
    answer = await broker.asker.ask("GET", "/metrics")
    remedy = "do not serve /metrics to the world"
    return [_refusal("metrics", [answer], {401, 403, 404}, "open to everybody", remedy)]


async def _health(broker: Deployment) -> list[Finding]:
    alive, ready = await asyncio.gather(broker.asker.ask("GET", "/healthz"), broker.asker.ask("GET", "/readyz"))
    look = "look at the broker's log"
    health = fine("healthz", "ok") if alive.status == 200 else wrong("healthz", f"answered {alive}", look)
    status = ready.body.get("status") if isinstance(ready.body, dict) else None
    if ready.status == 200 and status == "ok":
        return [health, fine("readyz", "ok")]
    if ready.status == 200 and status == "degraded":
        return [health, warning("readyz", "degraded: its store is gone, and each process counts for itself", look)]
    if ready.status == 503 and status == "draining":
        return [health, warning("readyz", "draining: it is about to end", "probe again when it has been replaced")]
    return [health, wrong("readyz", f"answered {ready}", look)]


async def _transport(broker: Deployment) -> list[Finding]:
    name = "https"
    parts = urlsplit(broker.asker.base_url)
    if parts.scheme == "http":
        if is_loopback(parts.hostname or ""):
            return [fine(name, "not needed on loopback")]
        return [
            warning(
                name,
                "plain http: anybody on the way can read tokens and take calls over",
                "put a proxy with TLS in front, and give its https URL",
            )
        ]
    if parts.port not in (None, 443):
        return [fine(name, "in use")]
    answer = await broker.asker.ask("GET", "/healthz", base_url=f"http://{parts.netloc.removesuffix(':443')}")
    if 200 <= answer.status < 300:
        return [warning(name, "in use, but plain http is answered too", "have the proxy redirect http to https")]
    return [fine(name, "in use")]


PROBES: dict[str, Callable[[Deployment], Awaitable[list[Finding]]]] = {
    "https": _transport,
    "health": _health,
    "forged Origin": _forged_origin,
    "Origin null": _null_origin,
    "no identity": _no_identity,
    "forged identity": _forged_identity,
    "forged user header": _forged_user,
    "forged address header": _forged_address,
    "odd ids": _odd_ids,
    "large body": _large_body,
    "large chunked body": _large_chunked_body,
    "other content type": _content_type,
    "other methods": _methods,
    "forged webhook": _webhook,
    "security headers": _headers,
    "metrics": _metrics,
}
