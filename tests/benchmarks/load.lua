-- wrk's side of rig.load: METHOD STATUS [HEADER VALUE ...] after the URL. Counts every answer that is not STATUS.
local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  expected = tonumber(args[2])
  unexpected = 0
  wrk.method = args[1]
  if wrk.method == "POST" then
    wrk.body = "{}"
    wrk.headers["Content-Type"] = "application/json"
  end
  for place = 3, #args, 2 do
    wrk.headers[args[place]] = args[place + 1]
  end
  prepared = wrk.format()
end

function request()
  return prepared
end

function response(status, headers, body)
  if status ~= expected then
    unexpected = unexpected + 1
  end
end

function done(summary, latency, requests)
  local wrong = 0
  for _, thread in ipairs(threads) do
    wrong = wrong + thread:get("unexpected")
  end
  local failed = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %f, "p50": %d, "p99": %d, "unexpected": %d, "errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99), wrong,
    failed.connect + failed.read + failed.write + failed.timeout))
end
