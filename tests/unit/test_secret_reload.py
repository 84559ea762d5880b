"""Secrets that change in their files while the broker runs."""

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from pydantic import SecretStr

from app.broker.build import secret_handlers
from app.broker.secret_reload import SecretReloader
from app.config.loading import load_settings, read_secret, with_secret
from app.config.settings import SECRETS, Settings, SettingsError, field_of
from app.identity.keyring import Keyring
from app.identity.keys import FixedKey, secret_key
from app.oneinbox import OneInbox
from app.oneinbox.errors import Busy, Misconfigured, OneInboxError, TimedOut
from app.store.memory import MemoryStore
from tests.conftest import Logs
from tests.support.harness import AGENT_ID, ONEINBOX, settings, started

OLD_KEY, NEW_KEY = "oi_sk_old_0123456789", "oi_sk_new_9876543210"
KEY, SECRET = "ONEINBOX_API_KEY", "BROKER_SECRET"


class Files:
    """Secrets mounted as Kubernetes does it: `<name>` → `..data/<name>`, and `..data` → a directory of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._versions = 0
        self._content: dict[str, str | bytes] = {}

    def hold(self, **content: str | bytes) -> None:
        """Swap to a version with these changes; every file keeps its size and time where it can."""
        self._content |= content
        self._versions += 1
        version = self.root / f"..v{self._versions}"
        version.mkdir()
        for name, text in self._content.items():
            (version / name).write_bytes(text if isinstance(text, bytes) else text.encode())
            os.utime(version / name, (0, 0))
            if not (self.root / name).is_symlink():
                (self.root / name).symlink_to(f"..data/{name}")
        (self.root / "..data_tmp").symlink_to(version.name)
        (self.root / "..data_tmp").rename(self.root / "..data")

    def settings(self, **environ: str) -> Settings:
        """Settings that read every file."""
        named = {f"{name}_FILE": str(self.root / name) for name in self._content}
        base = {} if KEY in self._content else {KEY: OLD_KEY}
        return load({**base, **named, **environ})


def load(environ: Mapping[str, str]) -> Settings:
    return load_settings({"ONEINBOX_AGENT_ID": AGENT_ID, **environ}, env_file=None)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    files = Files(tmp_path)
    files.hold(ONEINBOX_API_KEY=OLD_KEY, BROKER_SECRET="o" * 32)
    return files


class Taken(dict[str, Callable[[Settings], None]]):
    """Takers of every secret, which note what they are given."""

    def __init__(self) -> None:
        super().__init__({name: self._taker(name) for name in SECRETS})
        self.noted: list[tuple[str, str]] = []

    def _taker(self, name: str) -> Callable[[Settings], None]:
        return lambda renewed: self.noted.append((name, getattr(renewed, field_of(name)).get_secret_value()))


def rotation_of(settings: Settings, **options: Any) -> tuple[SecretReloader, Taken]:
    secret_reloader, taken = SecretReloader(settings, **options), Taken()
    secret_reloader.register(taken)
    return secret_reloader, taken


def errors(logs: Logs) -> list[str]:
    """What was logged as an error, as text."""
    return [repr(entry) for entry in logs if entry["log_level"] == "error"]


async def test_a_swapped_symlink_is_a_change(files: Files, logs: Logs) -> None:
    before = files.settings()
    secret_reloader, taken = rotation_of(before)
    await secret_reloader.reload()
    assert taken.noted == []

    files.hold(ONEINBOX_API_KEY=NEW_KEY)
    await secret_reloader.reload()
    await secret_reloader.reload()

    assert taken.noted == [(KEY, NEW_KEY)]
    assert secret_reloader.settings.oneinbox_api_key.get_secret_value() == NEW_KEY
    assert [(entry["event"], entry["setting"]) for entry in logs] == [("secret_renewed", KEY)]
    # The settings themselves never change.
    assert before.oneinbox_api_key.get_secret_value() == OLD_KEY
    assert secret_reloader.settings == before.model_copy(update={"oneinbox_api_key": SecretStr(NEW_KEY)})


async def test_a_written_file_is_a_change(files: Files) -> None:
    file = files.root / "plain"
    file.write_text(f"{OLD_KEY}\n")
    secret_reloader, taken = rotation_of(load({f"{KEY}_FILE": str(file), SECRET: "s" * 32}))

    file.write_text(OLD_KEY)  # but for the line break at its end
    await secret_reloader.reload()
    assert taken.noted == []

    file.write_text(f"{NEW_KEY}\r\n")
    await secret_reloader.reload()
    assert taken.noted == [(KEY, NEW_KEY)]


async def test_each_secret_is_replaced_alone(files: Files) -> None:
    secret_reloader, taken = rotation_of(files.settings())

    files.hold(BROKER_SECRET="n" * 32)
    await secret_reloader.reload()
    files.hold(ONEINBOX_API_KEY=NEW_KEY, BROKER_SECRET="m" * 32)
    await secret_reloader.reload()

    assert taken.noted[0] == (SECRET, "n" * 32)
    assert sorted(taken.noted[1:]) == [(SECRET, "m" * 32), (KEY, NEW_KEY)]


REFUSED: dict[str, tuple[str, str | bytes]] = {
    "empty": (KEY, ""),
    "blank": (KEY, "\n"),
    "publishable": (KEY, "oi_pk_0123456789abcdef"),
    "two-lines": (KEY, f"{NEW_KEY}\n{NEW_KEY}"),
    "binary": (KEY, b"oi_sk_\xff\xfe"),
    "short": (SECRET, "0123456789"),
    "one-short-line": (SECRET, "n" * 32 + "\n0123456789"),
    "short-jwt-secret": ("BROKER_JWT_SECRET", "0123456789"),
    "not-url-safe": ("BROKER_WEBHOOK_SECRET", "0123456789/0123456789/0123456789"),
    "no-store": ("BROKER_STORE_URL", "http://0123456789"),
}


@pytest.mark.parametrize(("name", "content"), REFUSED.values(), ids=REFUSED.keys())
async def test_an_invalid_value_is_refused_once(name: str, content: str | bytes, files: Files, logs: Logs) -> None:
    files.hold(
        BROKER_JWT_SECRET="j" * 32, BROKER_WEBHOOK_SECRET="w" * 32, BROKER_STORE_URL="redis://:hush@valkey.example"
    )
    secret_reloader, taken = rotation_of(files.settings(BROKER_AUTH="jwt"))
    before = secret_reloader.settings
    good = (files.root / name).read_text()

    files.hold(**{name: content})
    for _ in range(3):
        await secret_reloader.reload()

    assert taken.noted == []
    assert secret_reloader.settings is before
    [error] = errors(logs)
    assert name in error
    assert "0123456789" not in error
    # A good content is no line, the wrong one after it another, and so is another wrong one.
    for content_now, lines in ((good, 1), (content, 2), ("x y", 3)):
        files.hold(**{name: content_now})
        await secret_reloader.reload()
        assert len(errors(logs)) == lines


async def test_a_missing_file_changes_nothing(files: Files, logs: Logs) -> None:
    secret_reloader, taken = rotation_of(files.settings())

    (files.root / "..data").unlink()
    for _ in range(3):
        await secret_reloader.reload()
    assert taken.noted == []
    assert len(errors(logs)) == 2
    assert all("_FILE: cannot be read" in error for error in errors(logs))

    (files.root / "..data").symlink_to("..v1")
    await secret_reloader.reload()
    files.hold(ONEINBOX_API_KEY=NEW_KEY)
    await secret_reloader.reload()
    assert taken.noted == [(KEY, NEW_KEY)]


async def test_a_bad_file_does_not_block_others(files: Files) -> None:
    secret_reloader, taken = rotation_of(files.settings())

    files.hold(ONEINBOX_API_KEY=NEW_KEY, BROKER_SECRET="")
    await secret_reloader.reload()

    assert taken.noted == [(KEY, NEW_KEY)]


async def test_a_secret_that_its_handler_refuses_is_not_in_force(files: Files, logs: Logs) -> None:
    def refuse(_: Settings) -> None:
        raise SettingsError([f"{KEY}: does not please"])

    secret_reloader = SecretReloader(files.settings())
    secret_reloader.register({**Taken(), KEY: refuse})
    files.hold(ONEINBOX_API_KEY=NEW_KEY)
    for _ in range(3):
        await secret_reloader.reload()

    assert secret_reloader.settings.oneinbox_api_key.get_secret_value() == OLD_KEY
    assert len(errors(logs)) == 1


async def test_no_secret_shows(files: Files, logs: Logs) -> None:
    secret_reloader, _ = rotation_of(files.settings())
    for content in (NEW_KEY, "oi_pk_0123456789abcdef", "", OLD_KEY):
        files.hold(ONEINBOX_API_KEY=content)
        await secret_reloader.reload()
        for text in (repr(logs), repr(secret_reloader), repr(vars(secret_reloader)), repr(secret_reloader.settings)):
            assert OLD_KEY not in text
            assert NEW_KEY not in text
            assert "0123456789" not in text


async def test_files_are_read_off_the_event_loop(files: Files) -> None:
    def read(name: str, path: Path) -> str:
        readers.add(threading.get_ident())
        return read_secret(name, path)

    readers: set[int] = set()
    secret_reloader, _ = rotation_of(files.settings(), read=read)

    await secret_reloader.reload()

    assert readers
    assert threading.get_ident() not in readers


class SlowReader:
    """Reads a file, and holds what it read back until it is let go. `go_on_reading`: the next ones are not held."""

    def __init__(self) -> None:
        self.go_on_reading = False
        self.reads = 0
        self.has_read = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, name: str, path: Path) -> str:
        text = read_secret(name, path)
        self.reads += 1
        if not self.go_on_reading:
            self.has_read.set()
            assert self.go_on.wait(10)
        return text


@pytest.fixture
def plain(tmp_path: Path) -> Settings:
    """Settings with one secret in a file, `plain`."""
    (tmp_path / "plain").write_text(OLD_KEY)
    return load({f"{KEY}_FILE": str(tmp_path / "plain"), SECRET: "s" * 32})


async def test_concurrent_reloads_share_one_read(plain: Settings) -> None:
    slow = SlowReader()
    secret_reloader, _ = rotation_of(plain, read=slow)

    looks = [asyncio.create_task(secret_reloader.reload()) for _ in range(100)]
    await asyncio.to_thread(slow.has_read.wait)
    looks += [asyncio.create_task(secret_reloader.reload()) for _ in range(100)]
    await asyncio.sleep(0)  # so that these have asked, too
    slow.go_on.set()
    await asyncio.gather(*looks)

    assert slow.reads == 1
    await secret_reloader.reload()
    assert slow.reads == 2


async def test_a_cancelled_reload_does_not_cancel_others(plain: Settings, tmp_path: Path) -> None:
    slow = SlowReader()
    secret_reloader, taken = rotation_of(plain, read=slow)
    first, second = asyncio.create_task(secret_reloader.reload()), asyncio.create_task(secret_reloader.reload())
    await asyncio.to_thread(slow.has_read.wait)

    first.cancel()
    (tmp_path / "plain").write_text(NEW_KEY)
    slow.go_on.set()
    await second

    assert taken.noted == [(KEY, NEW_KEY)]


class Ticks:
    """Replaces the pause between two reads."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._waits, self._over = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self._waits.release()
        await self._over.acquire()

    async def begin(self) -> None:
        """End one waiting."""
        async with asyncio.timeout(10):
            await self._waits.acquire()
        self._over.release()

    async def tick(self) -> None:
        """End a pause, and wait for the read that follows."""
        await self.begin()
        async with asyncio.timeout(10):
            await self._waits.acquire()
        self._waits.release()


async def test_it_reloads_every_few_seconds(files: Files) -> None:
    ticks = Ticks()
    secret_reloader, taken = rotation_of(files.settings(), every=3, sleep=ticks.sleep)
    running = asyncio.create_task(secret_reloader.run())

    await ticks.tick()
    files.hold(ONEINBOX_API_KEY=NEW_KEY)
    await ticks.tick()
    running.cancel()

    assert taken.noted == [(KEY, NEW_KEY)]
    assert set(ticks.seconds) == {3}


async def test_it_goes_on_after_a_bug(files: Files, logs: Logs) -> None:
    ticks, noted = Ticks(), Taken()
    secret_reloader = SecretReloader(files.settings(), sleep=ticks.sleep)

    def fail(_: Settings) -> None:
        secret_reloader.register(noted)
        raise RuntimeError("a bug")

    secret_reloader.register({**noted, KEY: fail})
    running = asyncio.create_task(secret_reloader.run())
    files.hold(ONEINBOX_API_KEY=NEW_KEY)
    await ticks.tick()
    assert "secret_reload_failed" in repr(logs)
    await ticks.tick()
    running.cancel()

    assert noted.noted == [(KEY, NEW_KEY)]


async def test_without_files_there_is_nothing_to_do() -> None:
    secret_reloader, taken = rotation_of(settings())

    await secret_reloader.run()
    await secret_reloader.reload()

    assert taken.noted == []


async def test_a_reload_on_demand_does_not_use_a_read_that_had_begun(plain: Settings, tmp_path: Path) -> None:
    slow, ticks = SlowReader(), Ticks()
    secret_reloader, taken = rotation_of(plain, read=slow, sleep=ticks.sleep)
    running = asyncio.create_task(secret_reloader.run())
    await ticks.begin()
    await asyncio.to_thread(slow.has_read.wait)

    (tmp_path / "plain").write_text(NEW_KEY)
    slow.go_on_reading = True
    asked = asyncio.create_task(secret_reloader.reload())
    await asyncio.wait({asked}, timeout=0.05)  # a chance to overtake, which it must not take
    slow.go_on.set()
    await asked
    await ticks.begin()
    running.cancel()

    assert taken.noted == [(KEY, NEW_KEY)]
    assert slow.reads == 2


def test_every_secret_has_a_handler() -> None:
    oneinbox = OneInbox(ONEINBOX, SecretStr(OLD_KEY), Telling(), timeout=1, connect_timeout=1)

    assert secret_handlers(oneinbox, Keyring(["s" * 32]), None, None, MemoryStore()).keys() == SECRETS


def test_a_secret_alone_is_checked_and_replaced() -> None:
    before = settings({"BROKER_VARIABLES_FROM_CLAIMS": "a=b", "BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": "j" * 32})

    renewed = with_secret(before, "BROKER_JWT_SECRET", "n" * 32)

    assert renewed == before.model_copy(update={"jwt_secret": SecretStr("n" * 32)})
    with pytest.raises(SettingsError) as refused:
        with_secret(before, "BROKER_JWT_SECRET", "0123456789")
    [line] = refused.value.lines
    assert line.startswith("BROKER_JWT_SECRET: ")
    assert "0123456789" not in line


def test_a_keyring_signs_with_its_new_first_secret_and_verifies_with_all() -> None:
    old, new = "o" * 32, "n" * 32
    keyring = Keyring([old])
    mac, box = keyring.sign("call-key", b"call_1"), keyring.encrypt(b"answer")

    keyring.use([new, old])

    assert keyring.verify("call-key", b"call_1", mac)
    assert keyring.decrypt(box) == b"answer"
    assert keyring.sign("call-key", b"call_1") == Keyring([new]).sign("call-key", b"call_1")
    assert Keyring([new]).decrypt(keyring.encrypt(b"x")) == b"x"

    keyring.use([new])

    assert not keyring.verify("call-key", b"call_1", mac)
    assert keyring.decrypt(box) is None


async def test_another_login_key_is_another_version() -> None:
    one, other = FixedKey(secret_key("o" * 32)), FixedKey(secret_key("o" * 32))

    one.use(secret_key("n" * 32))

    found = await one.find("HS256", None)
    assert found is not None
    assert found.key == b"n" * 32
    assert one.version != other.version


def pem_of(curve: ec.EllipticCurve) -> tuple[str, str]:
    """A public key and its private one."""
    key = ec.generate_private_key(curve)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return public, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


async def test_a_login_key_that_does_not_go_with_the_algorithms_is_refused(files: Files, logs: Logs) -> None:
    (first, private), (second, _), (unfit, _) = map(pem_of, (ec.SECP256R1(), ec.SECP256R1(), ec.SECP384R1()))
    files.hold(BROKER_JWT_PUBLIC_KEY=first)
    before = files.settings(BROKER_AUTH="jwt", BROKER_JWT_ALGORITHMS="ES256")
    keys = FixedKey(secret_key("o" * 32))
    oneinbox = OneInbox(ONEINBOX, SecretStr(OLD_KEY), Telling(), timeout=1, connect_timeout=1)
    secret_reloader = SecretReloader(before)
    secret_reloader.register(secret_handlers(oneinbox, Keyring(["s" * 32]), keys, None, MemoryStore()))

    for wrong in (unfit, private, "no key at all"):
        files.hold(BROKER_JWT_PUBLIC_KEY=wrong)
        await secret_reloader.reload()
    assert keys.version == 0
    assert len(errors(logs)) == 3
    assert all("BROKER_JWT_PUBLIC_KEY" in error for error in errors(logs))

    files.hold(BROKER_JWT_PUBLIC_KEY=second)
    await secret_reloader.reload()
    assert await keys.find("ES256", None) is not None
    assert await keys.find("HS256", None) is None


class Telling(httpx.AsyncBaseTransport):
    """A OneInbox that takes one key, and keeps what arrives. `slow`: makes an answer wait."""

    def __init__(self, key: str = OLD_KEY) -> None:
        self.key = key
        self.requests: list[httpx.Request] = []
        self.slow: Callable[[], Any] | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.slow is not None:
            await self.slow()
        if request.headers["authorization"] != f"Bearer {self.key}":
            return httpx.Response(401, json={"detail": "no"})
        if request.method == "DELETE":
            return httpx.Response(204)
        return httpx.Response(200, json={**started(), "items": [], "url": "https://broker.example"})

    @property
    def keys(self) -> list[str]:
        """The key of each request."""
        return [request.headers["authorization"].removeprefix("Bearer ") for request in self.requests]


class Client:
    """A client whose key can be changed in its file."""

    def __init__(self, transport: httpx.AsyncBaseTransport, timeout: float = 15) -> None:
        self.file_key = OLD_KEY
        self.rereads = 0
        self.oneinbox = OneInbox(
            ONEINBOX, SecretStr(OLD_KEY), transport, timeout=timeout, connect_timeout=3, reread_key=self._reread
        )
        self._in_force = OLD_KEY

    async def _reread(self) -> None:
        self.rereads += 1
        await asyncio.sleep(0)
        if self.file_key != self._in_force:
            self._in_force = self.file_key
            self.oneinbox.use_key(SecretStr(self.file_key))

    async def start(self) -> str:
        call = await self.oneinbox.start_web_call(agent_id="agt_1", variables={"a": 1}, overrides={}, metadata={"b": 2})
        return call.id


REQUESTS: dict[str, Callable[[Client], Any]] = {
    "start": lambda client: client.start(),
    "get": lambda client: client.oneinbox.get_call("call_1"),
    "stop": lambda client: client.oneinbox.stop_call("call_1"),
    "list": lambda client: client.oneinbox.list_calls(),
    "register": lambda client: client.oneinbox.register_webhook(name="n", url="https://broker.example", events=[]),
    "webhooks": lambda client: client.oneinbox.list_webhooks(),
    "remove": lambda client: client.oneinbox.remove_webhook("wh_1"),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS.keys())
async def test_a_401_with_a_new_key_in_the_file_is_sent_again(request_: Callable[[Client], Any]) -> None:
    transport = Telling(NEW_KEY)
    client = Client(transport)
    client.file_key = NEW_KEY

    await request_(client)

    assert transport.keys == [OLD_KEY, NEW_KEY]
    first, second = transport.requests
    assert (first.method, first.url, first.content) == (second.method, second.url, second.content)
    assert first.headers.get("content-type") == second.headers.get("content-type")
    await request_(client)
    assert client.rereads == 1


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS.keys())
async def test_a_401_without_one_stands(request_: Callable[[Client], Any]) -> None:
    transport = Telling(NEW_KEY)
    client = Client(transport)

    with pytest.raises(Misconfigured) as refused:
        await request_(client)

    assert refused.value.may_have_acted is False
    assert transport.keys == [OLD_KEY]
    assert client.rereads == 1


async def test_a_second_401_stands() -> None:
    transport = Telling("another")
    client = Client(transport)
    client.file_key = NEW_KEY

    with pytest.raises(Misconfigured):
        await client.start()

    assert transport.keys == [OLD_KEY, NEW_KEY]


@pytest.mark.parametrize("status", [402, 403, 404, 422, 429, 500])
async def test_only_a_401_causes_a_reload(status: int) -> None:
    client = Client(httpx.MockTransport(lambda _: httpx.Response(status)))
    client.file_key = NEW_KEY

    with pytest.raises(OneInboxError):
        await client.start()

    assert client.rereads == 0


async def test_a_running_request_keeps_its_key_and_uses_the_new_one_after_a_401() -> None:
    async def wait() -> None:
        arrived.set()
        await go_on.wait()

    arrived, go_on = asyncio.Event(), asyncio.Event()
    transport = Telling()
    transport.slow = wait
    client = Client(transport)
    under_way = asyncio.create_task(client.start())
    await arrived.wait()

    client.oneinbox.use_key(SecretStr(NEW_KEY))
    transport.key = NEW_KEY
    go_on.set()

    assert await under_way == "call_1"
    assert transport.keys == [OLD_KEY, NEW_KEY]
    assert client.rereads == 0


async def test_without_a_file_a_401_stands() -> None:
    transport = Telling(NEW_KEY)
    oneinbox = OneInbox(ONEINBOX, SecretStr(OLD_KEY), transport, timeout=15, connect_timeout=3)

    with pytest.raises(Misconfigured):
        await oneinbox.get_call("call_1")

    assert len(transport.requests) == 1


async def test_both_tries_share_one_time_limit() -> None:
    async def hang_the_second_time() -> None:
        if len(transport.requests) == 2:
            await asyncio.Event().wait()

    transport = Telling(NEW_KEY)
    transport.slow = hang_the_second_time
    client = Client(transport, timeout=0.05)
    client.file_key = NEW_KEY

    with pytest.raises(TimedOut) as timed_out:
        await client.start()

    # The second one was taken, so it may have started a call.
    assert timed_out.value.may_have_acted is True
    assert transport.keys == [OLD_KEY, NEW_KEY]


async def test_a_volume_that_hangs_is_no_call_that_may_be_running() -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    transport = Telling(NEW_KEY)
    oneinbox = OneInbox(ONEINBOX, SecretStr(OLD_KEY), transport, timeout=0.05, connect_timeout=3, reread_key=hang)

    with pytest.raises(TimedOut) as timed_out:
        await oneinbox.start_web_call(agent_id="agt_1", variables={}, overrides={}, metadata={})

    assert timed_out.value.may_have_acted is False
    assert len(transport.requests) == 1


async def test_a_retry_that_was_never_sent_started_no_call() -> None:
    class Unreachable(Telling):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            response = await super().handle_async_request(request)
            if len(self.requests) == 2:
                raise httpx.ConnectError("")
            return response

    client = Client(Unreachable(NEW_KEY))
    client.file_key = NEW_KEY

    with pytest.raises(OneInboxError) as unreachable:
        await client.start()

    assert unreachable.value.slug == "upstream-unreachable"
    assert unreachable.value.may_have_acted is False


async def test_a_429_to_the_retry_begins_the_cool_down() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        new = request.headers["authorization"].endswith(NEW_KEY)
        return httpx.Response(429 if new else 401, headers={"Retry-After": "7"})

    client = Client(httpx.MockTransport(answer))
    client.file_key = NEW_KEY

    with pytest.raises(Busy):
        await client.start()

    assert 6 < client.oneinbox.breaker.seconds_left <= 7


async def test_a_client_shows_no_key() -> None:
    client = Client(Telling(NEW_KEY))
    client.file_key = NEW_KEY
    await client.start()
    client.file_key = "oi_sk_third"
    client.oneinbox.use_key(SecretStr("oi_sk_third"))

    with pytest.raises(Misconfigured) as refused:
        await client.start()

    for text in (repr(client.oneinbox), repr(refused.value), str(refused.value), repr(refused.value.__dict__)):
        assert "oi_sk" not in text
