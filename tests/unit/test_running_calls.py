"""Lists of calls that change while they are read, in either spelling of a status."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from app.limits.running_calls import MOST_REPEATED, PAGE, TRIES, pages, running_calls, running_pages
from app.oneinbox.errors import Failed, OneInboxError, Rejected
from app.oneinbox.models import CallPage

AGENT = "agt_test"


@dataclass
class Lists:
    """OneInbox's lists by status, newest call first. `after`: runs after each answer. `errors`: instead of answers.

    `asked`: offsets, by status.
    """

    calls: dict[str | None, list[str]]
    after: Callable[[], object] = lambda: None
    errors: dict[str | None, list[OneInboxError]] = field(default_factory=dict)
    totals: bool = True
    asked: list[tuple[str | None, int]] = field(default_factory=list)

    async def list_calls(self, *, agent_id: str, status: str | None, limit: int, offset: int) -> CallPage:
        assert (agent_id, limit) == (AGENT, PAGE)
        self.asked.append((status, offset))
        if self.errors.get(status):
            raise self.errors[status].pop(0)
        found = self.calls.get(status, [])
        items = [{"id": call, "status": status} for call in found[offset : offset + limit]]
        answer = {"items": items, **({"total": len(found)} if self.totals else {})}
        self.after()
        return CallPage.model_validate(answer)

    async def read(self, status: str | None = "in_progress") -> list[str]:
        """Return a list, page by page."""
        return [call.id async for page in pages(self, AGENT, status) for call in page.calls]  # type: ignore[arg-type]

    async def running(self) -> dict[str, str | None]:
        """Return the statuses of the running calls."""
        return {call: each.status for call, each in (await running_calls(self, AGENT)).items()}  # type: ignore[arg-type]


def names(count: int, prefix: str = "c") -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


@pytest.mark.parametrize("totals", [True, False])
@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 199, 200, 300, 4000])
async def test_a_list_is_read_by_hundreds(count: int, totals: bool) -> None:
    lists = Lists({"in_progress": names(count)}, totals=totals)
    assert await lists.read() == names(count)
    assert len(lists.asked) <= 1 + count / PAGE + (not totals)


async def test_ten_thousand_calls_cost_a_request_for_each_hundred() -> None:
    lists = Lists({"in_progress": names(10_000)})
    assert len(await lists.running()) == 10_000
    assert len(lists.asked) == 4 + 10_000 / PAGE


@pytest.mark.parametrize("ended", [1, 9, 30, 80, 100, 170])
@pytest.mark.parametrize("first", [0, 300])
async def test_calls_that_end_while_a_list_is_read_hide_no_other(ended: int, first: int) -> None:
    """The others move up, to pages that were read."""
    calls = names(1000)
    lists = Lists({"in_progress": calls})

    def end() -> None:
        if len(calls) > 500:
            del calls[first : first + ended]

    lists.after = end
    read = await lists.read()
    assert set(calls) <= set(read)
    assert len(read) == len(set(read))


async def test_new_calls_are_no_second_ones() -> None:
    calls = names(500)
    new = iter(names(10_000, "new"))
    lists = Lists({"in_progress": calls}, after=lambda: calls.insert(0, next(new)))
    read = await lists.read()
    assert Counter(read).most_common(1)[0][1] == 1
    assert set(names(500)) <= set(read)


async def test_most_of_a_list_may_end_at_once() -> None:
    calls = names(2000)
    lists = Lists({"in_progress": calls})

    def end() -> None:
        if len(lists.asked) == 15:
            del calls[:1400]

    lists.after = end
    assert set(await lists.read()) >= set(calls)


async def test_a_oneinbox_that_turns_no_page_is_no_endless_list() -> None:
    lists = Lists({})

    async def list_calls(**_: Any) -> CallPage:
        lists.asked.append((None, 0))
        return CallPage.model_validate({"items": [{"id": name} for name in names(PAGE)]})

    lists.list_calls = list_calls  # type: ignore[method-assign]
    with pytest.raises(OneInboxError):
        await lists.read()
    assert len(lists.asked) <= MOST_REPEATED + 1


async def test_a_failed_page_is_asked_for_again() -> None:
    failure = Failed("answered 503", may_have_acted=True, status=503)
    lists = Lists({"in_progress": names(150)}, errors={"in_progress": [failure] * (TRIES - 1)})
    assert await lists.read() == names(150)
    lists.errors = {"in_progress": [failure] * TRIES}
    with pytest.raises(Failed):
        await lists.read()


async def test_a_running_call_is_in_any_of_the_lists_and_in_either_spelling() -> None:
    lists = Lists({"queued": ["a"], "initiated": ["b"], "in_progress": ["c"], "in-progress": ["d"], None: ["e"]})
    assert await lists.running() == {"a": "queued", "b": "initiated", "c": "in_progress", "d": "in_progress"}


async def test_two_spellings_of_one_list_are_not_read_twice() -> None:
    lists = Lists({"in_progress": names(1000), "in-progress": names(1000)})
    assert len(await lists.running()) == 1000
    assert len([status for status, _ in lists.asked if status == "in-progress"]) == 1


@pytest.mark.parametrize("refused", ["in_progress", "in-progress"])
async def test_one_spelling_may_be_refused(refused: str) -> None:
    other = "in_progress" if refused == "in-progress" else "in-progress"
    lists = Lists({other: ["c"]}, errors={refused: [Rejected([])]})
    assert await lists.running() == {"c": "in_progress"}
    assert len(lists.asked) == 4


@pytest.mark.parametrize("refused", [["in_progress", "in-progress"], ["queued"], ["initiated"]])
async def test_lists_that_are_refused_tell_nothing(refused: list[str]) -> None:
    lists = Lists({}, errors={status: [Rejected([])] for status in refused})
    with pytest.raises(Rejected):
        await lists.running()


async def test_calls_that_have_ended_are_not_running_whatever_list_they_are_in() -> None:
    lists = Lists({"queued": []})

    async def list_calls(**_: Any) -> CallPage:
        return CallPage.model_validate({"items": [{"id": "a", "status": "completed"}, {"id": "b", "status": "queued"}]})

    lists.list_calls = list_calls  # type: ignore[method-assign]
    assert await lists.running() == {"b": "queued"}


async def test_a_call_that_moves_on_while_lists_are_read_is_in_one_of_them() -> None:
    lists = Lists({"queued": ["a"], "initiated": [], "in_progress": []})

    def move() -> None:
        for status, after in (("initiated", "in_progress"), ("queued", "initiated")):
            while lists.calls[status]:
                lists.calls[after].append(lists.calls[status].pop())

    lists.after = move
    read = [call.id async for calls in running_pages(lists, AGENT) for call in calls]  # type: ignore[arg-type]
    assert set(read) == {"a"}
