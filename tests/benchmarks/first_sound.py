"""Measure the time from the click to the first sound, in Chromium, on loopback.

    python -m tests.benchmarks.first_sound [--rounds 10] [--json FILE]

The whole way: client.js, a broker, the emulator, a real LiveKit server and the emulated agent, all on this machine. It
needs what the tests marked `voice` need. livekit-client is loaded already, as when the pointer has reached the button.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.benchmarks import rig
from tests.benchmarks.rig import say
from tests.e2e.conftest import chromium, running_broker, running_site
from tests.support.livekit import running_oneinbox, running_server
from tests.support.needs import NODE_MODULES, node

MEASURE = Path(__file__).parents[1] / "e2e/voice/measure.js"
PAGE = '<!doctype html><title>Talk</title><link rel="icon" href="data:,">'
TALK = """
async (address) => {
  const { Broker } = await import(`${address}/client.js`);
  const broker = new Broker();
  await broker.prepare();
  const click = performance.now();
  let microphone;
  const progress = (step) => { if (step === "connecting") microphone = performance.now(); };
  const call = await broker.talk({ progress });
  const joined = performance.now();
  const [post] = performance.getEntriesByName(`${address}/session`);
  for (;;) {
    const sound = heard.find(({ rms }) => rms > 0.01);
    if (sound) {
      await call.hangUp();
      return [microphone, post.responseEnd, joined, sound.at].map((at) => at - click);
    }
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}
"""
PARTS = ("microphone granted", "answer of POST /session", "room joined, microphone published", "first sound")
"""What TALK returns: milliseconds since the click."""


def measure(browser: Browser, site: str, broker: str) -> list[float]:
    """Return the times of one call, in a page of its own."""
    context = browser.new_context()
    page = context.new_page()
    page.add_init_script(path=MEASURE)
    page.goto(site)
    times: list[float] = page.evaluate(TALK, broker)
    context.close()
    return times


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.first_sound")
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    flags = ("--allow-loopback-in-peer-connection", "--autoplay-policy=no-user-gesture-required")
    try:
        node("livekit-client")
        settings = {
            "BROKER_ALLOWED_ORIGINS": "http://127.0.0.1:*",
            "BROKER_LIVEKIT_CLIENT": str(NODE_MODULES / "livekit-client/dist/livekit-client.umd.js"),
        }
        with tempfile.TemporaryDirectory() as folder, running_server() as livekit, chromium(*flags) as browser:
            (Path(folder) / "index.html").write_text(PAGE)
            with (
                running_oneinbox(livekit.options()) as oneinbox,
                running_broker(oneinbox, **settings) as (_, broker),
                running_site(Path(folder)) as site,
            ):
                rounds = [measure(browser, site, broker) for _ in range(options.rounds)]
    except pytest.skip.Exception as missing:
        sys.stderr.write(f"{missing}\n")
        return 1
    report = {
        part: f"{statistics.median(times):.0f} ms ({min(times):.0f} to {max(times):.0f})"
        for part, times in zip(PARTS, zip(*rounds, strict=True), strict=True)
    }
    say(rig.table([(f"after the click, medians of {options.rounds}", ""), *report.items()]))
    if options.json:
        options.json.write_text(json.dumps(dict(zip(PARTS, zip(*rounds, strict=True), strict=True)), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
