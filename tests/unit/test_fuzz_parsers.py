"""For any input, a parser returns what it promises or refuses in its own words; it never breaks.

X-Forwarded-For, the agents file, bodies, Retry-After and what a browser sees of a call have such tests elsewhere.
"""

import base64
import contextlib
import json
import math
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from app.calls.ownership import Ownership
from app.config.loading import load_settings
from app.config.settings import FIELDS, KNOWN, SECRETS, Settings, SettingsError
from app.identity import User
from app.identity.keyring import Keyring
from app.limits import CallAttempt
from app.oneinbox import CallRecord, OneInbox, WebCall
from app.oneinbox.errors import NoSuchCall, OneInboxError, Rejected
from app.oneinbox.models import CALL_ID, CallPage
from app.problems import Problem
from app.sessions.idempotency import PRINTABLE, _canonical, _expiry, read_key
from app.sessions.policy import CallSpec
from app.sessions.schemas import SessionRequest
from app.sessions.service import _browser_errors
from tests.support.call_world import outcome
from tests.support.harness import AGENT_ID, ONEINBOX
from tests.unit.test_agents import SUPPORT

ANN, NOBODY = User(mode="jwt", id="ann"), User(mode="anonymous", id="192.0.2.1")
MARKER = "PLANTED-0123456789"

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["", "completed", "queued", "2026-01-01T00:00:00Z", "wss://voice.oneinbox.ai", "call_1", "1e999"])
)
documents = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
FIELD_NAMES = [*CallRecord.model_fields, "server_url", "participant_token", "items", "detail", "loc", "msg", "total"]
records = st.dictionaries(st.sampled_from(FIELD_NAMES), documents)
ids = st.text("abcXYZ019_-", min_size=1, max_size=128)


# --- Idempotency-Key ---


@given(values=st.lists(st.text(st.characters(max_codepoint=255)), max_size=3), user=st.sampled_from([ANN, NOBODY]))
@example(values=['"0123456789abcdef"'], user=NOBODY)
@example(values=['"0123456789abcdef\\'], user=NOBODY)
def test_any_idempotency_key_is_a_key_or_a_422(values: list[str], user: User) -> None:
    key: str | Problem | None
    try:
        key = read_key(values, user)
    except Problem as problem:
        key = problem
    if isinstance(key, Problem):
        assert key.slug == "invalid-request"
        assert values
        said = json.dumps(list(key.errors))
        assert not any(len(value) > 3 and value in said for value in values)
        return
    assert (key is None) == (not values)
    if key is not None:
        assert PRINTABLE.fullmatch(key)
        assert user is ANN or len(key) >= 16


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=16, max_size=255))
def test_a_quoted_key_equals_the_bare_one(key: str) -> None:
    quoted = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    assert read_key([quoted], NOBODY) == key
    if key == key.strip() and not (key.startswith('"') and key.endswith('"')):
        assert read_key([key], NOBODY) == key


# --- the body, as one text ---


@given(documents.filter(lambda document: "NaN" not in str(document).replace("nan", "NaN")))
def test_the_same_json_is_one_text_however_it_is_written(document: Any) -> None:
    again = json.loads(json.dumps(document))
    assert _canonical(turned(document)) == _canonical(again) == _canonical(document)


def turned(value: Any) -> Any:
    """The same with every object's names in the other order, and whole numbers as fractions."""
    if isinstance(value, dict):
        return {name: turned(each) for name, each in reversed(value.items())}
    if isinstance(value, list):
        return [turned(each) for each in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    return value


@given(documents, documents)
def test_another_json_is_another_text(one: Any, other: Any) -> None:
    if _canonical(one) == _canonical(other):
        assert shape(one) == shape(other)


def shape(value: Any) -> Any:
    """JSON with its types, as Python takes True for 1."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value]
    if isinstance(value, float) and math.isnan(value):
        return "not a number"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return ("number" if number else type(value).__name__, value)


@given(
    st.text() | documents.map(lambda claims: f"e30.{packed(claims)}.c2ln") | st.binary().map(lambda raw: f"a.{raw!r}")
)
def test_any_participant_token_has_an_end_or_none(token: str) -> None:
    expires = _expiry(token)
    assert expires is None or math.isfinite(expires)


@given(documents)
def test_any_exp_is_an_end_or_none(claim: Any) -> None:
    expires = _expiry(f"e30.{packed({'exp': claim})}.c2ln")
    assert expires is None or math.isfinite(expires)


def packed(claims: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")


# --- OneInbox's answers ---


@given(records)
def test_any_record_with_an_id_is_a_call(record: dict[str, Any]) -> None:
    call = CallRecord.model_validate({**record, "id": "call_1"})
    assert isinstance(call.request_id, str)
    assert isinstance(call.owner, str)
    assert isinstance(call.ended, bool)
    if call.created_at is not None:
        assert call.created_at.tzinfo is not None
        call.created_at.timestamp()
    assert call.duration_seconds is None or math.isfinite(call.duration_seconds), "no end of talk time is counted"


@given(documents)
def test_any_record_is_a_call_or_refused(record: Any) -> None:
    try:
        call = CallRecord.model_validate(record)
    except ValidationError:
        return
    assert CALL_ID.fullmatch(call.id)


@given(st.lists(records | documents), ids)
def test_no_item_of_a_list_hides_another(items: list[Any], call_id: str) -> None:
    page = CallPage.model_validate({"items": [*items, {"id": call_id}]})
    assert page.items[-1].id == call_id


class Answering(httpx.AsyncBaseTransport):
    """A OneInbox with one answer to everything."""

    def __init__(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self._status, self._content, self._headers = status, content, headers

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(self._status, headers=self._headers, stream=httpx.ByteStream(self._content))


def oneinbox(status: int, content: bytes, headers: dict[str, str]) -> OneInbox:
    transport = Answering(status, content, headers)
    return OneInbox(ONEINBOX, SecretStr("oi_sk_x"), transport, timeout=5, connect_timeout=1)


contents = (
    st.binary()
    | documents.map(lambda value: json.dumps(value).encode())
    | records.map(lambda value: json.dumps(value).encode())
)
statuses = st.sampled_from([200, 201, 202, 204, 299, 302, 400, 401, 404, 408, 422, 429, 500, 503]) | st.integers(
    200, 599
)
headers = st.dictionaries(
    st.sampled_from(["content-encoding", "content-type", "retry-after", "location", "x-other"]),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=30)
    | st.sampled_from(["gzip", "identity", "5"]),
)


@given(statuses, contents, headers)
@settings(max_examples=300)
@example(201, b'{"id": "call_1", "server_url": "wss://x", "participant_token": "a.b.c"}', {})
async def test_any_answer_starts_a_call_or_fails_in_known_words(status: int, body: bytes, head: dict[str, str]) -> None:
    client = oneinbox(status, body, head)
    call = await outcome(client.start_web_call(agent_id=AGENT_ID, variables={}, overrides={}, metadata={}))
    if isinstance(call, OneInboxError):
        assert call.may_have_acted == (status < 400 or status >= 500 or status == 408)
        assert call.call_id is None or CALL_ID.fullmatch(call.call_id)
        return
    assert isinstance(call, WebCall)
    assert 200 <= status < 300
    assert CALL_ID.fullmatch(call.id)
    assert re.fullmatch(r"wss://[!-~]+", call.server_url)
    assert re.fullmatch(r"[!-~]+", call.participant_token)


@given(statuses, contents, headers, st.sampled_from(["get", "stop", "list"]))
@settings(max_examples=300)
async def test_any_answer_about_calls_is_one_or_fails_in_known_words(
    status: int, body: bytes, head: dict[str, str], what: str
) -> None:
    client = oneinbox(status, body, head)
    asking: dict[str, Callable[[], Awaitable[Any]]] = {
        "get": lambda: client.get_call("call_1"),
        "stop": lambda: client.stop_call("call_1"),
        "list": client.list_calls,
    }
    found = await outcome(asking[what]())
    if isinstance(found, OneInboxError):
        assert status != 404 or what == "list" or isinstance(found, NoSuchCall)
        return
    assert 200 <= status < 300
    assert isinstance(found, CallPage) if what == "list" else found.id == "call_1"


locs = st.lists(
    st.sampled_from(["body", "variables", "metadata", "overrides", "a", "tier", 0, True]) | documents, max_size=5
)
complaints = st.lists(
    st.fixed_dictionaries(
        {}, optional={"loc": locs | documents, "msg": documents, "type": documents, "input": documents}
    )
)


@given(complaints)
def test_any_complaint_of_oneinbox_is_about_the_browsers_words_or_told_to_nobody(errors: list[dict[str, Any]]) -> None:
    request = SessionRequest.model_validate({"variables": {"a": "b"}, "metadata": {"a": {"b": [1]}}})
    order = CallSpec(
        agent=SUPPORT, variables={"a": "b", "tier": "gold"}, own_variables={"a": "b"}, overrides={}, metadata={"a": {}}
    )
    told = _browser_errors(Rejected(errors).errors, request, order)
    for each in told or []:
        assert each.keys() == {"loc", "msg", "type"}
        assert each["loc"][:2] in (["body", "variables"], ["body", "metadata"])
        assert "tier" not in each["loc"][2:3]
        assert len(each["msg"]) <= 500
        json.dumps(each)
    if told and len(errors) <= 20:
        assert len(told) == len(errors), "all, or nothing"


# --- names of calls ---

KEYS = Keyring(["s" * 32])


@given(st.text() | ids.map(lambda name: f"{name}.{name}"), st.sampled_from([ANN, NOBODY]))
def test_any_name_of_a_call_is_an_id_or_nothing(name: str, user: User) -> None:
    call = Ownership(KEYS).call_id(name, user)
    assert call is None or CALL_ID.fullmatch(call)
    assert call is None or user is ANN, "nobody guesses a key"


@given(ids.filter(lambda name: name not in ("cursor", "web")), st.sampled_from([ANN, NOBODY]))
def test_a_call_is_found_under_its_own_name_only(call: str, user: User) -> None:
    owners = Ownership(KEYS)
    name = owners.public_id(call, user)
    assert owners.call_id(name, user) == call
    if user is NOBODY:
        for other in (name[:-1], f"{name}A", name.swapcase(), f"x{name}"):
            assert other == name or owners.call_id(other, user) is None


@given(st.builds(CallAttempt, ids, st.integers(0, 2**40), ids, ids, ids, ids | st.just(""), st.integers(-1, 2**40)))
def test_a_start_is_known_again_by_its_name(attempt: CallAttempt) -> None:
    assert CallAttempt.from_key(attempt.key) == attempt._replace(ends=0)
    assert CallAttempt.restored(attempt.unwritten, attempt.request_id, attempt.owner) == attempt


def test_a_start_without_an_organization_has_the_name_that_it_always_had() -> None:
    attempt = CallAttempt("r1", 1_800_000_000, "main", "ann", "owner")
    assert attempt.key == "r1 1800000000 main ann owner"
    assert attempt.unwritten == "1800000000 main ann 0.000"
    assert CallAttempt.restored("1800000000 main ann", "r1", "owner") == attempt, "as another version wrote it"
    assert attempt.sets == ["live:user:ann", "live:agent:main", "live:all"]
    assert attempt._replace(organization="shop").sets == [*attempt.sets, "live:org:shop"]


@given(st.text(" ab1", max_size=16))
def test_any_name_of_a_start_is_read_or_refused(name: str) -> None:
    with contextlib.suppress(ValueError):
        assert CallAttempt.from_key(name).key.split(" ")[2:] == name.split(" ")[2:]
    with contextlib.suppress(ValueError):
        restored = CallAttempt.restored(name, "r1", "owner")
        assert restored.unwritten.split(" ")[1:3] == name.split(" ")[1:3]
        assert restored.organization == "".join(name.split(" ")[4:])


# --- settings ---

LEAST = {"ONEINBOX_API_KEY": "oi_sk_x", "ONEINBOX_AGENT_ID": "agt_1"}
ODD = "* 0 -1 1 1e400 nan true https://a.example http://127.0.0.1:x https://[ 5/minute;; 5/minute;5/minute a=b,c jwt"
words = st.text() | st.sampled_from(
    [*ODD.split(), "10.0.0.0/8,::1/0", "redis://:p@h:1/x", "//", "https://a\nb", "\ud800"]
)


@given(st.dictionaries(st.sampled_from(sorted(KNOWN)), words, max_size=6))
def test_any_settings_are_taken_or_refused_by_name(given_settings: dict[str, str]) -> None:
    loaded = load({**LEAST, **given_settings})
    if isinstance(loaded, Settings):
        repr(loaded)
        return
    for line in loaded:
        assert "\n" not in line
        assert line.partition(":")[0] in KNOWN


@given(st.sampled_from(sorted(SECRETS)), st.text(max_size=40), st.text(max_size=40))
def test_no_secret_is_ever_repeated(name: str, before: str, after: str) -> None:
    loaded = load({**LEAST, name: f"{before}{MARKER}{after}"})
    assert MARKER not in (repr(loaded) if isinstance(loaded, Settings) else "".join(loaded))


@given(st.text(min_size=1).filter(lambda name: f"BROKER_{name}" not in KNOWN))
def test_an_unknown_name_is_refused_or_a_service_link(name: str) -> None:
    loaded = load({**LEAST, f"BROKER_{name}": "1"})
    assert isinstance(loaded, list) or re.search(r"(SERVICE_HOST|SERVICE_PORT|PORT)", name)


broken_lines = st.lists(st.sampled_from(sorted(FIELDS)), max_size=3).map(
    lambda names: "\n".join(f"{name}='" for name in names).encode()
)


@given(st.binary(max_size=200) | broken_lines)
@settings(max_examples=60)
def test_any_env_file_is_read_or_refused(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / ".env"
        file.write_bytes(content)
        assert load(LEAST, file)


@given(st.sampled_from(sorted(SECRETS)), st.binary(max_size=100))
@settings(max_examples=60)
def test_any_secret_file_is_read_or_refused(name: str, content: bytes) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "secret"
        file.write_bytes(content + MARKER.encode())
        least = {key: value for key, value in LEAST.items() if key != name}
        loaded = load({**least, f"{name}_FILE": str(file)})
        assert MARKER not in (repr(loaded) if isinstance(loaded, Settings) else "".join(loaded))


def load(environ: dict[str, str], env_file: Path | None = None) -> Settings | list[str]:
    """Return the settings, or the lines that say what is wrong."""
    try:
        return load_settings(environ, env_file=env_file)
    except SettingsError as error:
        return error.lines
