"""Reading a call for its owner."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from app.calls.ownership import BROKER_REQUEST_ID, Ownership
from app.calls.schemas import project
from app.identity import User
from app.limits import LiveCalls
from app.oneinbox import CallRecord, OneInbox
from app.problems import Problem


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A call as a browser sees it: JSON and its strong validator."""

    body: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class Calls:
    """Looks calls up, and shows each to its owner only.

    `agent_names`: configured name by agent id. `live`: is told of ends that are seen. `expose`: as BROKER_EXPOSE.
    """

    oneinbox: OneInbox
    ownership: Ownership
    agent_names: Mapping[str, str]
    live: LiveCalls
    expose: Collection[str]

    async def read(self, user: User, public_id: str) -> Snapshot:
        """The user's call. Raises the same `not-found` for a stranger's call, no call, and an id that is none."""
        call_id = self.ownership.call_id(public_id, user)
        if call_id is None:
            raise Problem("not-found")
        record = await self.oneinbox.get_call(call_id)
        if not self.ownership.owns(user, record):
            raise Problem("not-found")
        member = (record.metadata or {}).get(BROKER_REQUEST_ID)
        if isinstance(member, str):
            await self.live.see(member, record)
        return self._snapshot(record, public_id)

    def _snapshot(self, record: CallRecord, public_id: str) -> Snapshot:
        agent = self.agent_names.get(record.agent_id or "")
        call = project(record, public_id=public_id, agent=agent, expose=self.expose)
        body = call.model_dump_json(exclude_unset=True).encode()
        return Snapshot(body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
