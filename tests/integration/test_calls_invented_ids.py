"""Thousands of invented ids: few reach OneInbox, and owners are still served."""

import asyncio
import secrets
import time
from collections import Counter

import jwt
import pytest

from app.sandbox.server import running_emulator
from tests.support.brokers import LONG_CALLS, asked, running_broker_process
from tests.support.followers import figure

pytestmark = pytest.mark.process

ISSUER = "an issuer's secret of more than 32 characters"
SETTINGS = {
    "BROKER_AUTH": "jwt",
    "BROKER_JWT_SECRET": ISSUER,
    "BROKER_TRUSTED_PROXIES": "127.0.0.0/8",
}
IDS = 10_000
CONNECTIONS = 20
LONGEST_SECONDS = 6


def signed(user: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {jwt.encode({'sub': user, 'exp': time.time() + 600}, ISSUER, 'HS256')}"}


async def invent(host: str, port: int, number: int, until: float, statuses: Counter[str]) -> None:
    """Ask for one invented call after the other, over one raw connection, each time from another address."""
    reader, writer = await asyncio.open_connection(host, port)
    user = signed(f"inventor-{number}")["Authorization"]
    for _ in range(IDS // CONNECTIONS):
        if asyncio.get_running_loop().time() > until:
            break
        address = f"198.51.{secrets.randbelow(256)}.{secrets.randbelow(256)}"
        writer.write(
            f"GET /calls/{secrets.token_hex(12)} HTTP/1.1\r\nHost: x\r\nAuthorization: {user}\r\n"
            f"X-Forwarded-For: {address}\r\n\r\n".encode()
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        await reader.readexactly(length)
        status = head.split()[1]
        assert status == "404" or "retry-after: 1\r\n" in head
        statuses[status] += 1
    writer.close()


async def test_invented_ids() -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, running_broker_process(oneinbox.url, **SETTINGS) as broker:
        client, ann = broker.client, signed("ann")
        known = [(await client.post("/session", json={}, headers=ann)).headers["location"] for _ in range(5)]
        for path in known:
            assert (await client.get(path, headers=ann)).status_code == 200
        oneinbox.emulator.requests.clear()
        statuses: Counter[str] = Counter()
        loop = asyncio.get_running_loop()
        began = loop.time()
        url = client.base_url
        inventors = asyncio.gather(
            *(invent(url.host, url.port or 0, n, began + LONGEST_SECONDS, statuses) for n in range(CONNECTIONS))
        )
        waits = []
        while not inventors.done():
            asking = loop.time()
            answers = await asyncio.gather(
                client.post("/session", json={}, headers=ann), *(client.get(path, headers=ann) for path in known)
            )
            waits.append(loop.time() - asking)
            assert [answer.status_code for answer in answers] == [201] + [200] * len(known)
            await asyncio.wait([inventors], timeout=0.2)
        await inventors
        seconds = loop.time() - began

        mine = {path.removeprefix("/calls/") for path in known}
        fetches = sorted(r.at for r in asked(oneinbox.emulator, "get") if r.path.split("/")[3] not in mine)
        busiest = max(sum(at <= later < at + 1 for later in fetches) for at in fetches)
        figure("ids asked for in a second", round(statuses.total() / seconds))
        figure("fetches in a second", round(len(fetches) / seconds, 1))
        figure("slowest session, seconds", round(max(waits), 3))
        assert statuses.keys() == {"404", "503"}
        assert statuses["404"] == len(fetches)
        # Twenty by the broker's clock; on their way, those of one second may meet those of the next.
        assert busiest <= 40
        assert len(fetches) <= 20 * (seconds + 1)
        assert max(waits) < 2
