"""The container image: what is in it, and how it lives and ends. It is built once, which takes a minute or two."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app import __version__
from app.sandbox.emulator import EmulatorOptions
from tests.deploy.images import PACKAGES, Container, Image, built_image
from tests.documents import ROOT
from tests.support.needs import cannot, program

pytestmark = [pytest.mark.image, pytest.mark.timeout(600)]

SANDBOX = EmulatorOptions()
ENVIRON = {
    "ONEINBOX_API_KEY": SANDBOX.api_key,
    "ONEINBOX_BASE_URL": "http://127.0.0.1:9000",
    "ONEINBOX_AGENT_ID": SANDBOX.agents[0],
}
CONTROL = f"{ENVIRON['ONEINBOX_BASE_URL']}/_emulator"
SLOW = 5
"""Seconds that OneInbox takes to answer while the broker is told to stop."""
ASK = """
import json, sys, urllib.request
request = urllib.request.Request(sys.argv[1], data=sys.argv[2].encode() or None, method="POST")
request.add_header("Content-Type", "application/json")
with urllib.request.urlopen(request, timeout=60) as answer:
    print(answer.status, answer.read().decode())
"""
UNTIL_A_CALL_IS_THERE = """
import sys, urllib.request
while urllib.request.urlopen(sys.argv[1], timeout=60).read() == b"[]":
    pass
"""


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    for name, package in PACKAGES.items():
        program(name, package)
    if os.geteuid() != 0:
        cannot("an image is built here by root alone")
    with built_image(VERSION=__version__, REVISION="abc123") as image:
        yield image


def ask(container: Container, url: str, body: str = "") -> subprocess.Popen[str]:
    """POST from within the container's own network."""
    return container.beside(sys.executable, "-c", ASK, url, body)


def answer(asking: subprocess.Popen[str]) -> str:
    """Status and body, once they are there."""
    out, _ = asking.communicate(timeout=60)
    return out


def is_healthy(container: Container, image: Image) -> bool:
    """What the image's own health check says."""
    kind, *command = image.config["Healthcheck"]["Test"]
    assert kind == "CMD"
    return container.execute(*command).returncode == 0


@contextmanager
def serving(image: Image) -> Iterator[Container]:
    """The image's own command in front of an emulated OneInbox, once it is healthy."""
    with image.running(**ENVIRON) as container:
        emulator = container.beside(sys.executable, "-u", "-m", "app", "emulator")
        try:
            assert emulator.stdout is not None
            assert "listens on" in emulator.stdout.readline()
            deadline = time.monotonic() + 60
            while not is_healthy(container, image):
                assert container.process.poll() is None, container.process.communicate()
                assert time.monotonic() < deadline, "never healthy"
            yield container
        finally:
            emulator.kill()
            emulator.communicate()


def test_it_adds_at_most_120_megabytes_to_its_base(image: Image) -> None:
    assert 0 < image.size - image.base_size <= 120_000_000


def test_it_says_what_it_is(image: Image) -> None:
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.title"] == "oneinbox-broker"
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.revision"] == "abc123"
    assert labels["org.opencontainers.image.licenses"] == "MIT"
    assert image.config["ExposedPorts"] == {"8000/tcp": {}}


def test_it_runs_the_broker_itself_and_no_shell(image: Image) -> None:
    assert [*image.config["Entrypoint"], *image.config["Cmd"]] == ["oneinbox-broker", "serve", "--host", "0.0.0.0"]


def test_its_user_is_a_number_and_not_root(image: Image) -> None:
    """Kubernetes' runAsNonRoot cannot look a name up."""
    assert [int(part) > 0 for part in image.config["User"].split(":")] == [True, True]


def test_it_holds_the_broker_and_nothing_to_build_with(image: Image) -> None:
    broker = image.root / "opt/broker"
    assert (broker / "bin/oneinbox-broker").is_file()
    assert list(broker.glob("lib/python3*/site-packages/pip*")) == []
    assert [path for path in broker.glob("bin/*") if path.name.startswith("pip")] == []
    assert [name for name in ("gcc", "cc", "make", "curl", "git") if (image.root / "usr/bin" / name).exists()] == []
    assert list((image.root / "srv").iterdir()) == []
    assert not (image.root / "src").exists()


def test_nothing_but_what_it_is_built_from_got_in(image: Image) -> None:
    packages = next(iter((image.root / "opt/broker/lib").glob("python3*"))) / "site-packages"
    sent = {str(path.relative_to(packages)) for path in (packages / "app").rglob("*.py")}
    assert sent == {str(path.relative_to(ROOT)) for path in (ROOT / "app").rglob("*.py")}
    assert not (packages / "tests").exists()


def test_its_files_are_not_its_users(image: Image) -> None:
    owned = [path for path in (image.root / "opt/broker").rglob("*") if path.lstat().st_uid != 0]
    assert owned == []


def test_a_session_through_it_read_only_unprivileged_and_without_capabilities(image: Image) -> None:
    with serving(image) as container:
        started = answer(ask(container, "http://127.0.0.1:8000/session"))
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{container.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        written = container.execute("python", "-c", "open('/srv/here', 'w')")

    assert started.startswith("201 "), started
    assert json.loads(started.removeprefix("201 ")).keys() == {"server_url", "participant_token"}
    assert status["Uid"].split() == [image.config["User"].split(":")[0]] * 4
    assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, 0, "1")
    assert "Read-only file system" in written.stderr


def test_health_check_notices_that_nothing_answers(image: Image) -> None:
    with image.running("emulator") as container:  # listens, but not on the broker's port
        assert not is_healthy(container, image)


def test_told_to_stop_it_finishes_the_session_first(image: Image) -> None:
    with serving(image) as container:
        fault = json.dumps([{"kind": "latency", "operation": "start", "seconds": SLOW}])
        assert answer(ask(container, f"{CONTROL}/faults", fault)).startswith("2")
        asking = ask(container, "http://127.0.0.1:8000/session")
        watching = container.beside(sys.executable, "-c", UNTIL_A_CALL_IS_THERE, f"{CONTROL}/calls")
        assert watching.communicate(timeout=60)[0] == ""
        assert asking.poll() is None, "OneInbox has the request, and has not answered it yet"

        container.signal("TERM")

        assert answer(asking).startswith("201 ")
        assert container.process.wait(60) == 0


def test_wrong_settings_end_it_with_status_2(image: Image) -> None:
    with image.running() as container:
        out, err = container.process.communicate(timeout=60)

    assert container.process.returncode == 2
    assert "ONEINBOX_API_KEY" in out + err


def test_the_sandbox_runs_in_it_without_settings(image: Image) -> None:
    with image.running("sandbox", "--host", "0.0.0.0") as container:
        deadline = time.monotonic() + 60
        while not is_healthy(container, image):
            assert time.monotonic() < deadline, "never healthy"
        assert answer(ask(container, "http://127.0.0.1:8000/session")).startswith("201 ")
