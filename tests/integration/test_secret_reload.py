"""Secrets change under load, in a broker process, over real sockets."""

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from app.sandbox.server import RunningEmulator, running_emulator
from tests.support.brokers import (
    LONG_CALLS,
    BrokerProcess,
    asked,
    eventually,
    outcomes,
    post_many,
    running_broker_process,
)

pytestmark = pytest.mark.process

AT_ONCE = 100
ROTATIONS = 5
SOON = 10
"""Seconds in which a changed file is noticed, ample on a busy machine."""


class KeyFile:
    """ONEINBOX_API_KEY_FILE, mounted as Kubernetes does it: `key` → `..data/key`, and `..data` → a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.versions = 0
        self.path = root / "key"
        self.path.symlink_to("..data/key")
        self.hold(LONG_CALLS.api_key)

    def hold(self, content: str) -> None:
        """Swap `..data` at once."""
        self.versions += 1
        version = self._root / f"..v{self.versions}"
        version.mkdir()
        (version / "key").write_text(content)
        (self._root / "..data_tmp").symlink_to(version.name)
        (self._root / "..data_tmp").rename(self._root / "..data")

    @property
    def environ(self) -> dict[str, str]:
        """Settings of a broker that reads it."""
        return {"ONEINBOX_API_KEY": "", "ONEINBOX_API_KEY_FILE": str(self.path)}


def take(oneinbox: RunningEmulator, key: str) -> None:
    """Have OneInbox take this key from now on, and no other."""
    oneinbox.emulator.options = replace(oneinbox.emulator.options, api_key=key)


def refused(oneinbox: RunningEmulator) -> int:
    """How many sessions were asked for with a key that is not taken."""
    return len(asked(oneinbox.emulator, "start")) - len(oneinbox.emulator.calls)


async def logged(broker: BrokerProcess, event: str, times: int = 1) -> None:
    """Wait until the broker has said so."""

    async def has_said() -> bool:
        return [entry["event"] for entry in broker.logs].count(event) >= times

    await eventually(has_said, SOON)


async def test_sessions_work_through_a_rotation_under_load(tmp_path: Path) -> None:
    file = KeyFile(tmp_path)
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, **file.environ) as broker,
    ):
        seen: Counter[str] = Counter()
        answers = [0] * AT_ONCE
        over = False

        async def keep_asking(number: int) -> None:
            while not over:
                seen.update(outcomes(await post_many([broker], 1)))
                answers[number] += 1

        async def two_more_answers_for_each() -> None:
            before = list(answers)

            async def got() -> bool:
                return all(now >= then + 2 for now, then in zip(answers, before, strict=True))

            await eventually(got, SOON)

        asking = [asyncio.create_task(keep_asking(number)) for number in range(AT_ONCE)]
        await two_more_answers_for_each()
        for number in range(ROTATIONS):
            # The old key dies at once: what is under way is refused and sent again, once. No request sees two of these.
            file.hold(f"oi_sk_rotated_{number}")
            take(oneinbox, f"oi_sk_rotated_{number}")
            await two_more_answers_for_each()
        over = True
        await asyncio.gather(*asking)

        assert seen.keys() == {"201"}
        assert seen["201"] > 2 * AT_ONCE * ROTATIONS
        # Each session has one call.
        assert len(oneinbox.emulator.calls) == seen["201"]
        assert refused(oneinbox) >= ROTATIONS
        assert sum(entry["event"] == "secret_renewed" for entry in broker.logs) == ROTATIONS
        assert "oi_sk" not in repr(broker.logs)


async def test_a_hundred_at_once_after_the_old_key_has_died(tmp_path: Path) -> None:
    file = KeyFile(tmp_path)
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, **file.environ) as broker,
    ):
        file.hold("oi_sk_rotated")
        take(oneinbox, "oi_sk_rotated")

        responses = await post_many([broker], AT_ONCE)

        assert outcomes(responses) == {"201": AT_ONCE}
        assert len(oneinbox.emulator.calls) == AT_ONCE


async def test_a_key_that_is_swapped_in_good_time_is_never_refused(tmp_path: Path) -> None:
    file = KeyFile(tmp_path)
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, **file.environ) as broker,
    ):
        file.hold("oi_sk_rotated")
        await logged(broker, "secret_renewed")
        take(oneinbox, "oi_sk_rotated")

        assert outcomes(await post_many([broker], AT_ONCE)) == {"201": AT_ONCE}
        assert refused(oneinbox) == 0


async def test_an_invalid_key_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    file = KeyFile(tmp_path)
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, **file.environ) as broker,
    ):
        for number, content in enumerate(("", "oi_pk_0123456789abcdef"), start=1):
            file.hold(content)
            await logged(broker, "secret_rejected", times=number)
            assert outcomes(await post_many([broker], 5)) == {"201": 5}

        file.hold("oi_sk_rotated")
        await logged(broker, "secret_renewed")
        take(oneinbox, "oi_sk_rotated")
        assert outcomes(await post_many([broker], 5)) == {"201": 5}

        errors = [entry for entry in broker.logs if entry["level"] == "error"]
        assert [entry["setting"] for entry in errors] == ["ONEINBOX_API_KEY"] * 2
        assert "0123456789" not in repr(errors)
