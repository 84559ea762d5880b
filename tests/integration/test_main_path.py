"""The main path through sockets: one broker process, one emulated OneInbox, one Valkey."""

from app.sandbox.schemas import CallOverride
from app.sandbox.server import running_emulator
from tests.support.brokers import LONG_CALLS, asked, running_broker_process
from tests.support.followers import Follower
from tests.support.shapes import assert_limited, assert_problem, assert_session
from tests.support.valkey import Valkey

SETTINGS = {"BROKER_SESSION_LIMITS": "3/hour", "BROKER_MAX_LIVE_CALLS": "1"}


async def test_main_path(valkey: Valkey) -> None:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, BROKER_STORE_URL=valkey.url, **SETTINGS) as broker,
    ):
        client, emulator = broker.client, oneinbox.emulator

        # Start a call and read it.
        path = assert_session(await client.post("/session", json={}))
        read = await client.get(path)
        assert (read.status_code, read.json()["status"]) == (200, "in_progress")
        assert (await client.get(path, headers={"If-None-Match": read.headers["etag"]})).status_code == 304

        # A second one is one too many.
        assert_problem(await client.post("/session"), "too-many-live-calls")
        assert len(emulator.calls) == 1

        # Follow it to its end, which OneInbox brings about.
        follower = await Follower.open(str(client.base_url), path)
        await follower.has("in_progress")
        [call] = emulator.calls
        emulator.override(call, CallOverride(status="completed"))
        await follower.over()
        assert follower.ended
        assert follower.statuses == ["in_progress", "completed"]

        # Stop one: it ends at OneInbox, too, and its slot is free.
        path = assert_session(await client.post("/session"))
        stopped = await client.post(f"{path}/stop")
        assert (stopped.status_code, stopped.json()["status"]) == (200, "completed")
        assert len(asked(emulator, "stop")) == 1
        assert_session(await client.post("/session"))

        # The rate is used up, and Valkey knows.
        assert_limited(await client.post("/session"), "rate-limited")
        with valkey.client() as store:
            assert store.dbsize() > 0
        assert len(asked(emulator, "start")) == 3

        assert await broker.process.stop() == 0
        assert not [entry for entry in broker.logs if "exception" in entry]
