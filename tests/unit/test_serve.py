"""`serve`: where it listens."""

import pytest

from app.cli.serve import where_to_listen

PLACES: dict[str, tuple[str | None, str | None, int | None, tuple[str, int]]] = {
    "nothing": (None, None, None, ("127.0.0.1", 8000)),
    "port-given": (None, None, 9000, ("127.0.0.1", 9000)),
    "platform": ("8080", None, None, ("0.0.0.0", 8080)),
    "platform-free": ("0", None, None, ("0.0.0.0", 0)),
    "platform-cr": (" 8080\r", None, None, ("0.0.0.0", 8080)),
    "platform-quotes": ('"8080"', None, None, ("0.0.0.0", 8080)),
    "platform-empty": ("", None, None, ("127.0.0.1", 8000)),
    "host-given": ("8080", "127.0.0.1", None, ("127.0.0.1", 8080)),
    "both-given": ("8080", "::1", 9000, ("::1", 9000)),
    "port-given-on-a-platform": ("8080", None, 9000, ("0.0.0.0", 9000)),
    "free-port-given-on-a-platform": ("8080", None, 0, ("0.0.0.0", 0)),
    "port-of-something-else": ("tcp://10.0.0.1:80", "127.0.0.1", 9000, ("127.0.0.1", 9000)),
}


@pytest.mark.parametrize(("variable", "host", "port", "place"), PLACES.values(), ids=PLACES.keys())
def test_where_it_listens(
    variable: str | None, host: str | None, port: int | None, place: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PORT", raising=False)
    if variable is not None:
        monkeypatch.setenv("PORT", variable)

    assert where_to_listen(host, port) == place


@pytest.mark.parametrize("variable", ["http", "-1", "65536", "8080.0", "tcp://10.0.0.1:80", "\u0661", "9" * 5000])
def test_a_port_that_is_none(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORT", variable)
    with pytest.raises(SystemExit) as refused:
        where_to_listen(None, None)

    assert refused.value.code == 2
    assert capsys.readouterr().err == "PORT: is not a port; takes a whole number, 0 to 65535\n"
