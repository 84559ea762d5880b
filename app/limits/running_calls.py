"""Read OneInbox's lists of calls, newest first, without a gap although calls come and go between two pages."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

from app.oneinbox import CallRecord, OneInbox
from app.oneinbox.errors import Invalid, OneInboxError
from app.oneinbox.models import CallPage

IN_PROGRESS = ("in_progress", "in-progress")
"""One status in two spellings: OneInbox's reference has the first, its dashboard filters by the second."""
RUNNING = ("queued", "initiated", *IN_PROGRESS)
"""Statuses of running calls, in the order in which a call has them, so that a call that moves on is not missed."""
PAGE = 100
OVERLAP = 10
"""Calls that a page repeats from the one before, once calls have ended between two pages; until then, one."""
MOST_PAGES = 2000
MOST_REPEATED = 20
"""Pages in a row without a new call; after that, OneInbox is taken not to turn its pages."""
TRIES = 3
"""Times that a page is requested before the reading breaks off."""


class Page(NamedTuple):
    """The calls of a page that no page before had. `last`: the list ends here."""

    calls: list[CallRecord]
    last: bool


async def pages(
    oneinbox: OneInbox, agent_id: str, status: str | None = None, *, most: int = MOST_PAGES
) -> AsyncGenerator[Page, None]:
    """Yield the pages of an agent's calls, newest first, at most `most`. Raises OneInboxError.

    `status`: only calls in that status. Calls that leave such a list move the others up, so a page that shares no call
    with those before is read again from further back.
    """
    seen: set[str] = set()
    offset, overlap, repeated, back = 0, 1, 0, PAGE // 2
    for _ in range(most):
        page = await _page(oneinbox, agent_id, status, offset)
        ids = {call.id for call in page.items}
        if offset and seen.isdisjoint(ids):
            offset, overlap, back = max(0, offset - back), OVERLAP, 2 * back
            continue
        back = PAGE // 2
        last = page.listed < PAGE or (offset > 0 and page.total == offset + page.listed)
        repeated = repeated + 1 if ids <= seen else 0
        if repeated == MOST_REPEATED and not last:
            raise Invalid("lists the same calls again and again", may_have_acted=False)
        yield Page([call for call in page.items if call.id not in seen], last)
        if last:
            return
        seen |= ids
        offset += PAGE - overlap


async def running_pages(oneinbox: OneInbox, agent_id: str) -> AsyncGenerator[list[CallRecord], None]:
    """Yield an agent's running calls, page by page; a call whose status changes meanwhile may come again.

    Raises OneInboxError, also for a list longer than MOST_PAGES. OneInbox may refuse one of the spellings of a status,
    or take both for the same.
    """
    refusal: OneInboxError | None = None
    spelled: set[str] = set()
    for status in RUNNING:
        page = Page([], last=False)
        try:
            async with aclosing(pages(oneinbox, agent_id, status)) as read:
                async for page in read:
                    yield [call for call in page.calls if not call.ended]
                    if status == IN_PROGRESS[0]:
                        spelled.update(call.id for call in page.calls)
                    elif status == IN_PROGRESS[1] and not spelled.isdisjoint(call.id for call in page.calls):
                        return  # the same list once more
        except OneInboxError as error:
            if status not in IN_PROGRESS or error.status not in (400, 422) or refusal is not None:
                raise
            refusal = error
        else:
            if not page.last:
                raise Invalid("lists too many calls", may_have_acted=False)


async def running_calls(oneinbox: OneInbox, agent_id: str) -> dict[str, CallRecord]:
    """Return all running calls of an agent by id, with nothing but their status. Raises OneInboxError."""
    running: dict[str, CallRecord] = {}
    async for calls in running_pages(oneinbox, agent_id):
        running |= {call.id: CallRecord(id=call.id, status=call.status) for call in calls}
    return running


async def _page(oneinbox: OneInbox, agent_id: str, status: str | None, offset: int) -> CallPage:
    for left in reversed(range(TRIES)):
        try:
            return await oneinbox.list_calls(agent_id=agent_id, status=status, limit=PAGE, offset=offset)
        except OneInboxError as error:
            if not left or error.status in (400, 422):
                raise
    raise AssertionError  # pragma: no cover
