"""Terminal manners of the commands: help, colour, Ctrl-C, broken pipes, closed and full outputs."""

import fcntl
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from typer.main import get_group

from app import __version__
from app.cli.commands import EXIT_STATUS, cli
from tests.support.processes import PATIENCE, run, running, surroundings

pytestmark = pytest.mark.process

REQUIRED = {"ONEINBOX_API_KEY": "oi_sk_terminal", "ONEINBOX_AGENT_ID": "agt_terminal"}
DEAD = {**REQUIRED, "ONEINBOX_BASE_URL": "http://127.0.0.1:1"}


def every_command() -> list[tuple[str, ...]]:
    """The words of each command, of groups as well."""
    words: list[tuple[str, ...]] = [()]
    for name, command in get_group(cli).commands.items():
        words.append((name,))
        words += [(name, inner) for inner in getattr(command, "commands", {})]
    return words


@pytest.fixture
def environ() -> dict[str, str]:
    """Nothing that switches colour on or off."""
    return surroundings({"TERM": "xterm", "NO_COLOR": ""})


def wait_until_up(line: str) -> None:
    """Wait for an answer of the server whose first URL stands in this line: before, signals are not its own yet."""
    match = re.search(r"http://[0-9.]+:[0-9]+", line)
    assert match is not None, line
    with suppress(urllib.error.HTTPError), urllib.request.urlopen(f"{match[0]}/healthz", timeout=PATIENCE):
        pass


def helped(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", every_command(), ids=lambda words: "-".join(words) or "all")
def test_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(words, capsys)
    assert "\n  Example" in text or "\nExample" in text
    assert f"oneinbox-broker {' '.join(words)}".rstrip() in text
    assert EXIT_STATUS in " ".join(text.split())
    assert text.isascii()
    assert "\x1b" not in text


def test_no_line_of_the_list_of_commands_is_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert "..." not in helped((), capsys).partition("Commands:")[2]


def test_examples_are_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for words in every_command():
        for line in helped(words, capsys).splitlines():
            if line.strip().startswith("oneinbox-broker "):
                first = line.split()[1]
                assert first in get_group(cli).commands


def test_version(tmp_path: Path) -> None:
    done = run("--version", cwd=tmp_path, environ={})
    assert (done.code, done.out, done.err) == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("arguments", [("no-such",), ("serve", "--no-such"), ("block",), ("doctor", "--probe")])
def test_wrong_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run(*arguments, cwd=tmp_path, environ={})
    assert (done.code, done.out) == (2, "")
    assert "Error: " in done.err
    assert "\x1b" not in done.err


@pytest.mark.parametrize(
    ("arguments", "meant"), [(("servee",), "serve"), (("unblok",), "unblock"), (("serve", "--prot", "1"), "--port")]
)
def test_what_was_perhaps_meant(tmp_path: Path, arguments: tuple[str, ...], meant: str) -> None:
    assert meant in run(*arguments, cwd=tmp_path, environ={}).err.partition("Error: ")[2]


def on_terminal(arguments: tuple[str, ...], cwd: Path, environ: Mapping[str, str]) -> str:
    """What a command prints when its stdout is a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "app", *arguments], cwd=cwd, env=environ, stdout=theirs, stderr=subprocess.DEVNULL
    ) as process:
        os.close(theirs)
        output = b""
        try:
            while piece := os.read(ours, 4096):
                output += piece
        except OSError:  # how a terminal ends on Linux
            pass
        process.wait(PATIENCE)
    os.close(ours)
    return output.decode()


def test_colour_on_a_terminal_only(tmp_path: Path, environ: dict[str, str]) -> None:
    environ |= DEAD
    shown = on_terminal(("doctor",), tmp_path, environ)
    assert "\x1b[31m✗\x1b[0m oneinbox" in shown
    assert "\x1b" not in on_terminal(("doctor",), tmp_path, environ | {"NO_COLOR": "1"})
    assert "\x1b" not in on_terminal(("doctor",), tmp_path, environ | {"TERM": "dumb"})
    assert "\x1b" not in on_terminal(("doctor", "--json"), tmp_path, environ)
    piped = run("doctor", cwd=tmp_path, environ=DEAD)
    assert piped.code == 1
    assert "✗ oneinbox" in piped.out
    assert "\x1b" not in piped.out


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_plain_words_where_stdout_has_no_check_mark(tmp_path: Path, encoding: str) -> None:
    done = run("doctor", cwd=tmp_path, environ=DEAD | {"PYTHONIOENCODING": encoding})
    assert done.code == 1
    assert "X  oneinbox: " in done.out
    assert " -> " in done.out
    assert done.err == ""


@pytest.mark.parametrize(
    "arguments",
    [("openapi",), ("doctor",), ("doctor", "--json"), ("--help",), ("--version",), ("sandbox", "--port", "0")],
)
def test_a_reader_that_has_gone(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """As in `oneinbox-broker openapi | head -1`."""
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "app", *arguments],
            cwd=tmp_path,
            env=surroundings(DEAD),
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", ["openapi", "--version", "doctor"])
def test_closed_streams(tmp_path: Path, arguments: str) -> None:
    for closed in (">&-", "2>&-", ">&- 2>&- <&-"):
        line = f'exec "$0" -m app {arguments} {closed}'
        done = subprocess.run(
            ["sh", "-c", line, sys.executable],
            cwd=tmp_path,
            env=surroundings(DEAD),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == (1 if arguments == "doctor" else 0), closed
        assert done.stderr == ""


def test_a_server_without_any_stream(tmp_path: Path) -> None:
    """Its sockets must not take the streams' places."""
    line = 'exec "$0" -m app serve --port 0 >&- <&-'
    with subprocess.Popen(
        ["sh", "-c", line, sys.executable], cwd=tmp_path, env=surroundings(DEAD), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        wait_until_up(process.stderr.readline())
        process.terminate()
        process.stderr.read()
        assert process.wait(PATIENCE) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", ["openapi", "doctor"])
def test_a_full_disk(tmp_path: Path, arguments: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "app", arguments],
            cwd=tmp_path,
            env=surroundings(DEAD),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "stdout: cannot be written (No space left on device)\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("arguments", "sign"),
    [
        (("serve", "--port", "0"), '"listening"'),
        (("sandbox", "--port", "0"), "Open http://"),
        (("emulator", "--port", "0"), "The emulated OneInbox listens on"),
    ],
    ids=["serve", "sandbox", "emulator"],
)
def test_servers_end_well(tmp_path: Path, arguments: tuple[str, ...], sign: str, number: signal.Signals) -> None:
    with running(*arguments, cwd=tmp_path, environ=DEAD) as process:
        wait_until_up(process.wait_for(sign))
        process.send_signal(number)
        assert process.end() == 0
        assert not [line for line in process.err if "Traceback" in line]


def test_ctrl_c_of_a_command_that_waits(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        environ = REQUIRED | {"ONEINBOX_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        # As long as a request may take: on a busy machine the signal must still come in time.
        environ |= {"ONEINBOX_TIMEOUT": "60"}
        with running("doctor", cwd=tmp_path, environ=environ) as process:
            connection, _ = silent.accept()
            process.send_signal(signal.SIGINT)
            assert process.end() == 130
            connection.close()
        assert process.err == []


# What `serve` says at its start


class Terminal:
    """A server whose terminal this is."""

    def __init__(self, arguments: tuple[str, ...], cwd: Path, environ: Mapping[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 80))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app", *arguments],
            cwd=cwd,
            env=environ,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - it takes no lock
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, text: str) -> None:
        """Read until this text is shown."""
        while text not in self.shown:
            self.shown += os.read(self._ours, 4096).decode().replace("\r\n", "\n")

    def interrupt(self) -> int:
        """Type Ctrl-C; the exit status."""
        os.write(self._ours, b"\x03")
        with suppress(OSError):  # how a terminal ends on Linux
            while piece := os.read(self._ours, 4096):
                self.shown += piece.decode()
        code = self.process.wait(PATIENCE)
        os.close(self._ours)
        return code


@pytest.mark.parametrize("command", ["serve", "sandbox", "emulator"])
def test_ctrl_c_on_a_terminal(tmp_path: Path, environ: dict[str, str], command: str) -> None:
    terminal = Terminal((command, "--port", "0"), tmp_path, environ | DEAD)
    terminal.wait_for("http://127.0.0.1:")
    terminal.wait_for("\n")
    wait_until_up(terminal.shown)
    assert terminal.interrupt() == 0
    assert "Traceback" not in terminal.shown


def test_what_serve_says_on_a_terminal(tmp_path: Path, environ: dict[str, str]) -> None:
    """In words, no line of them longer than the terminal is wide."""
    environ |= DEAD | {"NO_COLOR": "1", "BROKER_TALK_MINUTES": "30"}
    terminal = Terminal(("serve", "--port", "0", "--host", "0.0.0.0"), tmp_path, environ)
    terminal.wait_for("32 random characters\n")
    wait_until_up(terminal.shown)
    assert terminal.interrupt() == 0
    words = " ".join(terminal.shown.split())
    assert "The broker listens on http://0.0.0.0:" in words
    assert "anonymous" in words
    assert "5/minute;50/day per user, 60/minute;1000/day for all users" in words
    assert "2 calls per user" in words
    assert "30 minutes in 24 h per user" in words
    for caution in ("anonymous and public", "store", "allowed origins", "variables", "secret"):
        assert f"! {caution}: " in words
    assert "a restart forgets" in words
    assert "\x1b" not in terminal.shown
    assert max(map(len, terminal.shown.splitlines())) <= 80


def test_a_format_that_is_asked_for_is_kept_on_a_terminal(tmp_path: Path, environ: dict[str, str]) -> None:
    terminal = Terminal(("serve", "--port", "0"), tmp_path, environ | DEAD | {"BROKER_LOG_FORMAT": "json"})
    terminal.wait_for("http://127.0.0.1:")
    terminal.wait_for("\n")
    wait_until_up(terminal.shown)
    assert terminal.interrupt() == 0
    assert terminal.shown.startswith("{")


def said(tmp_path: Path, *arguments: str, **changes: str) -> dict[str, dict[str, object]]:
    """The log's first lines: `listening`, and the cautions by what they are about."""
    environ = {**DEAD, "BROKER_ALLOWED_ORIGINS": "https://www.example.com", "BROKER_ALLOWED_VARIABLES": "a", **changes}
    with running("serve", "--port", "0", *arguments, cwd=tmp_path, environ=environ) as process:
        wait_until_up(process.wait_for('"listening"'))
        assert process.terminate() == 0
    return {str(record.get("about", record["event"])): record for record in process.records}


def test_what_serve_says(tmp_path: Path) -> None:
    records = said(tmp_path, BROKER_ALLOWED_VARIABLES="*", BROKER_ALLOWED_ORIGINS="")
    listening = records["listening"]
    assert listening["auth"] == "anonymous"
    assert listening["limits"] == "5/minute;50/day"
    assert listening["live_calls"] == 2
    assert listening["global_limits"] == "60/minute;1000/day"
    assert {"allowed origins", "variables", "store", "secret"} <= records.keys()
    assert "anonymous and public" not in records
    for about in ("allowed origins", "variables"):
        assert records[about]["level"] == "warning"
        assert records[about]["remedy"]


def test_a_public_broker_without_logins_is_warned_about(tmp_path: Path) -> None:
    records = said(tmp_path, "--host", "0.0.0.0")
    assert "you pay for" in str(records["anonymous and public"]["meaning"])
    assert "anonymous and public" not in said(tmp_path, "--host", "0.0.0.0", BROKER_CHALLENGE_SECRET="secret")
