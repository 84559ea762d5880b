"""Lua scripts that the Valkey server runs: one per operation, so each is one round trip, and atomic.

Times are the server's, in microseconds since 1970 (doubles hold them exactly): replicas' clocks need not agree. The
window is that of sliding_window.py, as a MessagePack list `time, count, time, count, …`, oldest first. Every write sets
an expiry.
"""

from dataclasses import dataclass, field
from hashlib import sha1

from app.store.budget import WINDOW
from app.store.protocol import BUDGET, BUDGET_CLAIM, PAGE
from app.store.sliding_window import GRID, MOST

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
"""

_ADD = """
local function add(key, member, lease)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  redis.call('ZADD', key, now + lease, member)
  local last = redis.call('ZRANGE', key, -1, -1, 'WITHSCORES')[2]
  redis.call('PEXPIREAT', key, math.ceil(last / 1000))
end
"""

_CELL = f"""
local function same_cell(one, other, amount, span)
  if one == other then return true end
  local cell = span / {GRID}
  return amount > {GRID} and math.floor(one / cell) == math.floor(other / cell)
end
"""


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the digest that the server knows it by."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", sha1(self.text.encode(), usedforsecurity=False).hexdigest())


DUE_SECONDS = 8 * 86400
"""The index of due times expires this long after its last change: longer than the longest call."""

_PLAN = f"""
local function plan(key, member, delay)
  redis.call('ZADD', key, string.format('%.0f', now + delay), member)
  redis.call('EXPIRE', key, {DUE_SECONDS})
end
"""

_BUDGET = (
    _PLAN
    + f"""
-- A budget is a list: limit (-1: only counted), running, at, members, then time and used of each cell; all in
-- milliseconds. It is what budget.py's UsedTime is. Its key may be absent, and members may come or go unseen: then
-- it is counted again.
local WINDOW, HEAD = {WINDOW * 1000}, 4
local ms = math.floor(now / 1000)

local function start_of(member)
  local start = string.match(member, '^%S+ (%d+)')
  return start and math.min(start * 1000, ms) or ms
end

local function leave_budget(b, member, used)
  b[4] = b[4] - 1
  b[2] = b[4] > 0 and math.max(0, b[2] - b[3] + start_of(member)) or 0
  used = math.min(used, WINDOW)
  if used <= 0 then return end
  local size, cell = #b, WINDOW / {GRID}
  if size > HEAD and math.floor(b[size - 1] / cell) == math.floor(b[3] / cell) then
    b[size - 1], b[size] = b[3], b[size] + used
  else
    b[size + 1], b[size + 2] = b[3], used
  end
end

local function load_budget(set, key)  -- returns the budget, and whether it must be saved
  local packed = redis.call('GET', key)
  local b = packed and cmsgpack.unpack(packed) or {{-1, 0, ms, 0}}
  if ms > b[3] then b[2], b[3] = b[2] + b[4] * (ms - b[3]), ms end
  local first = HEAD + 1
  while b[first] and b[first] + WINDOW <= b[3] do first = first + 2 end
  if first > HEAD + 1 then
    local kept = {{b[1], b[2], b[3], b[4]}}
    for at = first, #b do kept[#kept + 1] = b[at] end
    b = kept
  end
  -- Those whose leases have ended: no one saw their ends.
  local ended = redis.call('ZRANGEBYSCORE', set, '-inf', string.format('%.0f', now), 'LIMIT', 0, {PAGE})
  for _, each in ipairs(ended) do
    redis.call('ZREM', set, each)
    leave_budget(b, each, b[3] - start_of(each))
  end
  local count = redis.call('ZCARD', set)
  if count == b[4] then return b, #ended > 0 end
  b[2], b[4] = 0, count
  for _, each in ipairs(redis.call('ZRANGE', set, 0, -1)) do b[2] = b[2] + b[3] - start_of(each) end
  return b, true
end

local function total_of(b)
  local sum = b[2]
  for at = HEAD + 2, #b, 2 do sum = sum + b[at] end
  return sum
end

local function runs_out(b)
  local left, at = b[1] - total_of(b), b[3]
  if left <= 0 then return at end
  for i = HEAD + 1, #b, 2 do
    local leaves = b[i] + WINDOW
    if left < b[4] * (leaves - at) then break end
    left, at = left - b[4] * (leaves - at) + b[i + 1], leaves
  end
  return at + math.ceil(left / b[4])
end

local function free_in(b, limit)
  local left = total_of(b) - b[2] - limit
  if left < 0 then return 0 end
  for i = HEAD + 1, #b, 2 do
    left = left - b[i + 1]
    if left < 0 then return b[i] + WINDOW - b[3] end
  end
  return 0
end

local function join_budget(b, set, member)
  if not redis.call('ZSCORE', set, member) then b[2], b[4] = b[2] + b[3] - start_of(member), b[4] + 1 end
end

local function save_budget(b, key, due, name)
  if b[1] < 0 or b[4] == 0 then
    redis.call('ZREM', due, name)
  else
    local at, planned = runs_out(b), redis.call('ZSCORE', due, name)
    -- One that has run out already may be claimed: its place in the index is not its time.
    if at > b[3] or not planned or tonumber(planned) > now + {BUDGET_CLAIM * 1e6:.0f} then
      plan(due, name, at * 1000 - now)
    end
  end
  if b[4] > 0 then
    redis.call('SET', key, cmsgpack.pack(b), 'PX', {DUE_SECONDS * 1000})
  elseif #b > HEAD then
    redis.call('SET', key, cmsgpack.pack(b), 'PX', b[#b - 1] + WINDOW - b[3] + 1)
  else
    redis.call('DEL', key)
  end
end
"""
)

DECIDE = Script(
    _NOW
    + _ADD
    + _CELL
    + _BUDGET
    + f"""
-- KEYS: rates, then slots, then budgets and the index of due times (if there are budgets), then perhaps a record. ARGV:
-- number of rates, of rates and slots, cost, enforce (1 or 0), member, lease, number of budgets, then amount and span
-- for each rate, capacity (-1: none) for each slot, slot, seconds, enforced, name for each budget, value and ttl of the
-- record.
-- Returns, joined by blanks: counted, then refused, remaining, reset, mark for each rate, then refused, used for each
-- slot, then refused, remaining, reset for each budget.
local rates, last, cost, enforce = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4] == '1'
local member, lease, budgets = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])

local function load(key, span)
  local packed = redis.call('GET', key)
  if not packed then return {{}}, 0 end
  local all = cmsgpack.unpack(packed)
  local size, first, total = #all, 1, 0
  while first < size and all[first] + span <= now do first = first + 2 end
  for at = first + 1, size, 2 do total = total + all[at] end
  if first == 1 then return all, total end
  local kept = {{}}
  for at = first, size do kept[at - first + 1] = all[at] end
  return kept, total
end

local function count(window, amount, span)
  local size, mark = #window, now
  local newest = window[size - 1]
  -- If the server's clock was set back, entries stay in order, and leave late rather than early.
  if newest and newest > mark then mark = newest end
  if newest and same_cell(mark, newest, amount, span) then
    window[size - 1], window[size] = mark, window[size] + cost
  else
    window[size + 1], window[size + 2] = mark, cost
    if size + 2 > {2 * MOST} then
      window[4] = window[4] + window[2]
      table.remove(window, 1)
      table.remove(window, 1)
    end
  end
  return mark
end

local function wait(window, total, target, span)
  if total == 0 then return span end
  local at, left = 1, total - window[2]
  while left > target and window[at + 2] do
    at = at + 2
    left = left - window[at + 1]
  end
  return window[at] + span - now
end

local windows, totals, used, refused, free = {{}}, {{}}, {{}}, {{}}, true
for i = 1, rates do
  windows[i], totals[i] = load(KEYS[i], tonumber(ARGV[7 + 2 * i]))
  refused[i] = totals[i] + cost > tonumber(ARGV[6 + 2 * i])
  free = free and not refused[i]
end
for i = rates + 1, last do
  local capacity = tonumber(ARGV[7 + rates + i])
  used[i] = redis.call('ZCOUNT', KEYS[i], string.format('(%.0f', now), '+inf')
  local ends = cost > 0 and redis.call('ZSCORE', KEYS[i], member)
  local needed = used[i]
  if cost > 0 and not (ends and tonumber(ends) > now) then needed = needed + 1 end
  refused[i] = capacity >= 0 and needed > capacity
  free = free and not refused[i]
  if cost > 0 then used[i] = {{used[i], needed}} else used[i] = {{used[i], used[i]}} end
end
local times, at = {{}}, 8 + rates + last
for i = 1, budgets do
  local set = KEYS[rates + 1 + tonumber(ARGV[at])]
  local b, changed = load_budget(set, KEYS[last + i])
  times[i] = {{set = set, b = b, changed = changed, limit = tonumber(ARGV[at + 1]) * 1000, name = ARGV[at + 3]}}
  times[i].refused = cost > 0 and times[i].limit >= 0 and total_of(b) >= times[i].limit
  if cost > 0 then b[1], times[i].changed = ARGV[at + 2] == '1' and times[i].limit or -1, true end
  free = free and not times[i].refused
  at = at + 4
end

local counted = cost > 0 and (free or not enforce)
local answer = {{counted and '1' or '0'}}
for i = 1, rates do
  local amount, span = tonumber(ARGV[6 + 2 * i]), tonumber(ARGV[7 + 2 * i])
  local window, total, mark = windows[i], totals[i], 0
  if counted then
    mark = count(window, amount, span)
    total = total + cost
    redis.call('SET', KEYS[i], cmsgpack.pack(window), 'PX', math.ceil((mark + span - now) / 1000))
  end
  local target = refused[i] and amount - cost or math.min(total, amount) - 1
  answer[#answer + 1] = string.format('%d %d %.0f %.0f', refused[i] and 1 or 0, math.max(amount - total, 0),
    wait(window, total, target, span), mark)
end
for i, time in ipairs(times) do
  if counted then join_budget(time.b, time.set, member) end
  if time.changed then save_budget(time.b, KEYS[last + i], KEYS[last + budgets + 1], time.name) end
end
for i = rates + 1, last do
  if counted then add(KEYS[i], member, lease) end
  answer[#answer + 1] = string.format('%d %d', refused[i] and 1 or 0, used[i][counted and 2 or 1])
end
for i, time in ipairs(times) do
  answer[#answer + 1] = string.format('%d %.0f %.0f', time.refused and 1 or 0,
    math.max(0, time.limit - total_of(time.b)), time.limit >= 0 and free_in(time.b, time.limit) or 0)
end
local records = last + (budgets > 0 and budgets + 1 or 0)
if counted and #KEYS > records then redis.call('SET', KEYS[#KEYS], ARGV[#ARGV - 1], 'NX', 'PX', ARGV[#ARGV]) end
return table.concat(answer, ' ')
"""
)

GIVE_BACK = Script(
    _NOW
    + _CELL
    + _BUDGET
    + """
-- KEYS: rates, then slots, then budgets and the index of due times (if there are budgets), then perhaps a record. ARGV:
-- number of rates, of rates and slots, cost, member, number of budgets, then amount, span, mark for each rate, then
-- slot, name for each budget.
local budgets, at = tonumber(ARGV[5]), 6 + 3 * tonumber(ARGV[1])
local rates, last, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
for i = 1, rates do
  local amount, span, mark = tonumber(ARGV[3 + 3 * i]), tonumber(ARGV[4 + 3 * i]), tonumber(ARGV[5 + 3 * i])
  local packed = redis.call('GET', KEYS[i])
  local window = packed and cmsgpack.unpack(packed) or {}
  for at = #window - 1, 1, -2 do
    if same_cell(window[at], mark, amount, span) then
      window[at + 1] = math.max(window[at + 1] - cost, 0)
      if window[at + 1] == 0 then
        table.remove(window, at)
        table.remove(window, at)
      end
      if #window == 0 then
        redis.call('DEL', KEYS[i])
      else
        redis.call('SET', KEYS[i], cmsgpack.pack(window), 'KEEPTTL')
      end
      break
    end
  end
end
for i = 1, budgets do
  local set = KEYS[rates + 1 + tonumber(ARGV[at])]
  local b = load_budget(set, KEYS[last + i])
  if redis.call('ZREM', set, ARGV[4]) == 1 then leave_budget(b, ARGV[4], 0) end
  save_budget(b, KEYS[last + i], KEYS[last + budgets + 1], ARGV[at + 1])
  at = at + 2
end
for i = rates + 1, last do redis.call('ZREM', KEYS[i], ARGV[4]) end
if #KEYS > last + (budgets > 0 and budgets + 1 or 0) then redis.call('DEL', KEYS[#KEYS]) end
"""
)

ADD_MEMBER = Script(_NOW + _ADD + "add(KEYS[1], ARGV[1], tonumber(ARGV[2]))\n")

REMOVE_MEMBER = Script(
    _NOW
    + """
local left = 0
for i = 1, #KEYS do
  local ends = redis.call('ZSCORE', KEYS[i], ARGV[1])
  if ends and tonumber(ends) > now then left = 1 end
  redis.call('ZREM', KEYS[i], ARGV[1])
end
return left
"""
)

MEMBERS = Script(
    _NOW
    + f"""
-- KEYS: a set. ARGV: cursor. Returns the next cursor, and of a part of the living members each with what it has left.
local page = redis.call('ZSCAN', KEYS[1], ARGV[1], 'COUNT', {PAGE})
local found, living = page[2], {{}}
for at = 1, #found, 2 do
  local left = found[at + 1] - now
  if left > 0 then
    living[#living + 1] = found[at]
    living[#living + 1] = string.format('%.0f', left)
  end
end
return {{page[1], living}}
"""
)

REPLACE = Script(
    """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""
)

DELETE = Script("if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end\nreturn redis.call('DEL', KEYS[1])\n")

CHANGE = Script(
    _NOW
    + _ADD
    + _BUDGET
    + """
-- KEYS: one for each step, three for `enter` and `end`: set, budget, index. ARGV: of each step its word and arguments;
-- expectations come first.
-- is VALUE, none | set VALUE TTL | join MEMBER LEASE, leave MEMBER | push VALUE KEEP TTL
-- | due MEMBER DELAY, done MEMBER | enter MEMBER LEASE NAME, end MEMBER USED NAME
local at = 0
local function take()
  at = at + 1
  return ARGV[at]
end
local step_at = 1
while KEYS[step_at] do
  local key, step = KEYS[step_at], take()
  step_at = step_at + ((step == 'enter' or step == 'end') and 3 or 1)
  if step == 'is' then
    if redis.call('GET', key) ~= take() then return 0 end
  elseif step == 'none' then
    if redis.call('EXISTS', key) == 1 then return 0 end
  elseif step == 'set' then
    local value = take()
    redis.call('SET', key, value, 'PX', take())
  elseif step == 'join' then
    local member = take()
    add(key, member, tonumber(take()))
  elseif step == 'leave' or step == 'done' then
    redis.call('ZREM', key, take())
  elseif step == 'due' then
    local member = take()
    plan(key, member, tonumber(take()))
  elseif step == 'enter' or step == 'end' then
    local member, number, name = take(), tonumber(take()), take()
    local b = load_budget(key, KEYS[step_at - 2])
    if step == 'enter' then
      join_budget(b, key, member)
      add(key, member, number)
    elseif redis.call('ZREM', key, member) == 1 then
      leave_budget(b, member, number)
    end
    save_budget(b, KEYS[step_at - 2], KEYS[step_at - 1], name)
  else
    redis.call('LPUSH', key, take())
    redis.call('LTRIM', key, 0, take() - 1)
    redis.call('PEXPIRE', key, take())
  end
end
return 1
"""
)

TAKE_DUE = Script(
    _NOW
    + _PLAN
    + """
-- KEYS: the index of due times. ARGV: most, claim, then the members that are held. Returns the members that are taken.
-- A budget is claimed for a shorter time.
local most, claim = tonumber(ARGV[1]), tonumber(ARGV[2])
local function take(member)
  local is_budget = string.sub(member, 1, BUDGET_SIZE) == 'BUDGET'
  plan(KEYS[1], member, is_budget and math.min(claim, BUDGET_CLAIM) or claim)
end
for i = 3, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) then take(ARGV[i]) end
end
local taken = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now), 'LIMIT', 0, most)
for _, member in ipairs(taken) do take(member) end
return taken
""".replace("BUDGET_SIZE", str(len(BUDGET)))
    .replace("BUDGET_CLAIM", f"{BUDGET_CLAIM * 1e6:.0f}")
    .replace("'BUDGET'", f"'{BUDGET}'")
)

HAS_RUN_OUT = Script(
    _NOW
    + _BUDGET
    + """
-- KEYS: set, budget, index of due times. ARGV: limit in seconds (-1: none; empty: as it is), name. Returns 1 or 0.
local b = load_budget(KEYS[1], KEYS[2])
if ARGV[1] ~= '' then b[1] = math.max(-1, ARGV[1] * 1000) end
save_budget(b, KEYS[2], KEYS[3], ARGV[2])
return b[1] >= 0 and b[4] > 0 and total_of(b) >= b[1] and 1 or 0
"""
)

DUE_IN = Script(
    _NOW
    + """
local answer = {}
for i, member in ipairs(ARGV) do
  local due = redis.call('ZSCORE', KEYS[1], member)
  answer[i] = due and string.format('%.0f', due - now)
end
return answer
"""
)

MARK = Script(
    _NOW
    + """
-- KEYS: generation, a replica's beat. ARGV: generation to write if there is none, beat, ttl. Returns the generation,
-- whether it is new, the beat before, and the server's time.
local generation, before = redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])
local new = not generation
if new then generation = ARGV[1] end
redis.call('SET', KEYS[1], generation, 'PX', ARGV[3])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return {generation, new and 1 or 0, before or '0', string.format('%.0f', now)}
"""
)
