"""The LiveKit server that the sandbox starts: here a stand-in program that answers, or does not."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from app.sandbox.livekit_server import HTTP_PORT, LiveKitError, running_livekit
from tests.support.commands import invoke

SERVER = f"""#!{sys.executable}
import http.server, json, sys

class OK(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

config = json.loads(sys.argv[sys.argv.index("--config-body") + 1])
assert "--dev" in sys.argv
[address] = config["bind_addresses"]
http.server.HTTPServer((address, config["port"]), OK).serve_forever()
"""
FAILS = f"#!{sys.executable}\nprint('starting')\nprint('could not listen')\n"


def program(folder: Path, text: str) -> str:
    path = folder / "livekit-server"
    path.write_text(text)
    path.chmod(0o700)
    return str(path)


def test_server_runs_until_the_context_ends(tmp_path: Path) -> None:
    with running_livekit(program(tmp_path, SERVER)) as server:
        assert httpx.get(server.url.replace("ws", "http")).is_success

    assert server.process.poll() is not None


def test_port_in_use_is_left_alone(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with suppress(OSError):  # something else listens there already
            stack.enter_context(socket.create_server(("127.0.0.1", HTTP_PORT)))
        server = stack.enter_context(running_livekit(program(tmp_path, SERVER)))

        assert not server.url.endswith(f":{HTTP_PORT}")


@pytest.mark.parametrize(
    ("text", "why"), [(FAILS, "it ended at once: could not listen"), (f"#!{sys.executable}\n", "nothing")]
)
def test_server_that_does_not_start_is_one_line(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(LiveKitError, match=why), running_livekit(program(tmp_path, text)):
        pass


@pytest.fixture
def signals_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_restored")
@pytest.mark.parametrize(
    ("arguments", "installed", "code", "says"),
    [
        (["--livekit"], None, 2, "there is no livekit-server on the PATH"),
        (["--livekit"], FAILS, 1, "livekit-server did not start: it ended at once: could not listen"),
        (["--livekit", "--livekit-url", "ws://127.0.0.1:7880"], None, 2, "takes no --livekit-url"),
        (["--livekit", "--livekit-key", "devkey"], None, 2, "takes no --livekit-url, --livekit-key"),
        (["--livekit-url", "ws://127.0.0.1:7880"], None, 2, "set all three or none"),
        (["--livekit-key", "devkey"], None, 2, "set all three or none"),
        (["--livekit-secret", "secret"], None, 2, "set all three or none"),
    ],
)
def test_wrong_use_is_one_line(  # noqa: PLR0917 - fixtures
    arguments: list[str], installed: str | None, code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed is not None:
        program(tmp_path, installed)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    done = invoke("sandbox", *arguments, environ={})

    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("--livekit")
    assert says in done.err
    assert done.err.count("\n") == 1
