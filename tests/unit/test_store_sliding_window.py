"""The sliding window against a model that remembers every hit. Times are multiples of 1/64 s: exact in doubles."""

from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import given
from hypothesis import strategies as st

from app.store import Decision, LimitRequest, Rate
from app.store.memory import MemoryStore
from app.store.sliding_window import GRID, MOST, Window, count, drop, entries, fresh, wait

TICK = 1 / 64


T = TypeVar("T")


def window_of(store: MemoryStore) -> Window:
    """A copy of what is kept of the one rate."""
    return bytearray(store._windows.get(Rate("r", 1, 1)) or fresh(1))


def now_or_never(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that awaits nothing, so nothing else can have run in between."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("it waited")


@dataclass
class Model:
    """Every hit that stands, `[time, cost]`, and nothing clever."""

    rate: Rate
    hits: list[list[float]] = field(default_factory=list)

    def held(self, now: float, seconds: float) -> int:
        return int(sum(cost for time, cost in self.hits if time > now - seconds))


questions = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "wait", "observe", "look", "give back"]),
        st.sampled_from([0, 0, 1, 2, 5, 40]),  # ticks that pass before
        st.sampled_from([1, 1, 2, 4, 30]),  # cost
    ),
    min_size=40,
    max_size=150,
)


@given(
    amount=st.sampled_from([1, 2, 5, 63, 64, 65, 100, 200]), seconds=st.sampled_from([1, 4, 64]), questions=questions
)
def test_no_window_ever_holds_more(amount: int, seconds: int, questions: list[tuple[str, int, int]]) -> None:
    now = 1000.0
    store, rate = MemoryStore(lambda: now), Rate("r", amount, seconds)
    model = Model(rate)
    cell = seconds / GRID if amount > GRID else 0
    given: list[tuple[LimitRequest, Decision, list[float]]] = []
    reset = 0.0
    blurred = False  # counted past the amount: entries were merged, and nothing can be said of what is given back
    for what, ticks, size in questions:
        now += ticks * TICK
        if what == "wait":  # the adversary comes back as soon as told, with all it can get
            now += reset
        cost = 0 if what == "look" else size
        if what == "give back":
            if given and not blurred:
                request, decision, hit = given.pop()
                now_or_never(store.give_back(request, decision))
                if hit[0] > now - seconds:
                    hit[1] -= request.cost
            continue
        before = model.held(now, seconds)
        request = LimitRequest([rate], cost=cost, enforce=what != "observe")
        decision = now_or_never(store.decide(request))
        if decision.allowed:
            assert before + cost <= amount
        else:
            assert model.held(now, seconds + cell) + cost > amount
        reset = 0.0 if decision.allowed else decision.rates[0].reset
        if decision.counted:
            model.hits.append([now, cost])
            given.append((request, decision, model.hits[-1]))
        assert decision.counted == (cost > 0 and (decision.allowed or what == "observe"))
        held, late = model.held(now, seconds), model.held(now, seconds + cell)
        if what == "observe":
            blurred = blurred or held > amount
        elif not blurred:
            assert max(amount - late, 0) <= decision.rates[0].remaining <= max(amount - held, 0)
        if not decision.allowed and cost <= amount:
            # The promised time is honest, and not a tick too late. (The store itself minds a clock that goes back.)
            reset = decision.rates[0].reset
            assert amount - drop(window_of(store), now + reset) >= cost
            assert reset > 0
        assert len(entries(window_of(store))) <= MOST


def test_a_hit_leaves_when_the_window_has_passed_and_not_before() -> None:
    now = 100.0
    store, rate = MemoryStore(lambda: now), Rate("r", 2, 10)
    assert now_or_never(store.decide(LimitRequest([rate]))).rates[0].remaining == 1
    now = 104.0
    assert now_or_never(store.decide(LimitRequest([rate]))).rates[0].remaining == 0
    now = 109.875
    refused = now_or_never(store.decide(LimitRequest([rate])))
    assert refused.refused == (0,)
    assert refused.rates[0].reset == 0.125
    both = now_or_never(store.decide(LimitRequest([rate], cost=2)))
    assert both.rates[0].reset == 4.125
    now = 110.0
    assert now_or_never(store.decide(LimitRequest([rate]))).allowed
    assert not now_or_never(store.decide(LimitRequest([rate]))).allowed


def test_a_shared_entry_leaves_with_its_newest_hit() -> None:
    now = 640.0
    store, rate = MemoryStore(lambda: now), Rate("r", 100, 64)  # a cell is a second
    now_or_never(store.decide(LimitRequest([rate], cost=50)))
    now = 640.875
    now_or_never(store.decide(LimitRequest([rate], cost=50)))
    now = 704.75
    refused = now_or_never(store.decide(LimitRequest([rate])))
    assert not refused.allowed
    assert refused.rates[0].reset == 0.125
    now = 704.875
    assert now_or_never(store.decide(LimitRequest([rate], cost=100))).allowed


def test_reset_says_when_more_is_free() -> None:
    now = 100.0
    store, rate = MemoryStore(lambda: now), Rate("r", 5, 10)
    assert now_or_never(store.decide(LimitRequest([rate], cost=0))).rates[0].reset == 10  # empty: the whole window
    now_or_never(store.decide(LimitRequest([rate])))
    now = 103.0
    assert now_or_never(store.decide(LimitRequest([rate]))).rates[0].reset == 7  # the oldest hit leaves
    now_or_never(store.decide(LimitRequest([rate], cost=9, enforce=False)))
    look = now_or_never(store.decide(LimitRequest([rate], cost=0)))
    assert look.rates[0].reset == 10  # far above: not before the nine leave


def test_a_large_amount_costs_few_entries_and_little_accuracy() -> None:
    now = 0.0
    store, rate = MemoryStore(lambda: now), Rate("r", 1000, 64)
    allowed = 0
    for _ in range(64 * 50 * 4):
        now += 1 / 50
        allowed += now_or_never(store.decide(LimitRequest([rate]))).allowed
    assert 3 * 1000 <= allowed <= 4 * 1000
    assert len(entries(window_of(store))) <= MOST


def test_give_back_takes_only_from_the_entry_it_was_counted_in() -> None:
    now = 100.0
    store, rate = MemoryStore(lambda: now), Rate("r", 2, 10)
    first = now_or_never(store.decide(LimitRequest([rate])))
    now = 110.0  # the first has left by itself
    now_or_never(store.decide(LimitRequest([rate])))
    now_or_never(store.decide(LimitRequest([rate])))
    now_or_never(store.give_back(LimitRequest([rate]), first))
    assert not now_or_never(store.decide(LimitRequest([rate]))).allowed


@given(st.floats(0, 1e6), st.integers(1, 3660 * 86400))
def test_no_wait_is_longer_than_the_window(now: float, seconds: int) -> None:
    rate = Rate("user", 1, seconds)
    window = fresh(seconds)
    count(window, rate, now, 1)
    assert wait(window, now, 0) <= seconds
