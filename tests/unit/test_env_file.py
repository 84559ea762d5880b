"""`.env`: each line is a setting, a comment or blank; anything else is refused with its number."""

import os
from pathlib import Path

import pytest

from app.config.loading import load_settings
from app.config.settings import SettingsError
from tests.support.harness import AGENT_ID, API_KEY

NEEDED = {"ONEINBOX_API_KEY": API_KEY, "ONEINBOX_AGENT_ID": AGENT_ID}

REFUSED = {
    "colon": "BROKER_SESSION_LIMITS: 1/day",
    "no-value": "BROKER_SESSION_LIMITS",
    "blank-instead-of-equals": "BROKER_SESSION_LIMITS 1/day",
    "double-quote": 'BROKER_SESSION_LIMITS="1/day',
    "single-quote": "BROKER_SESSION_LIMITS='1/day",
    "text-after-the-quote": 'BROKER_SESSION_LIMITS="1/day"x',
    "quote-that-closes-in-another-setting": 'OTHER="x\nBROKER_SESSION_LIMITS=1/day\nANOTHER=y"',
    "hyphens": "BROKER-SESSION-LIMITS=1/day",
    "dots": "broker.session.limits=1/day",
    "windows": "set BROKER_SESSION_LIMITS=1/day",
    "powershell": '$env:BROKER_SESSION_LIMITS = "1/day"',
    "export-alone": "export BROKER_SESSION_LIMITS",
    "two": "BROKER_DOCS=false BROKER_SESSION_LIMITS=1/day",
    "two-quoted": 'BROKER_DOCS="false" BROKER_SESSION_LIMITS="1/day"',
    "two-with-semicolon": "BROKER_DOCS=false; BROKER_SESSION_LIMITS=1/day",
    "two-after-one-of-others": "OTHER=1 BROKER_SESSION_LIMITS=1/day",
    "two-before-one-of-others": "BROKER_JWT_ISSUER=issuer OTHER=1",
    "two-with-export": "BROKER_JWT_ISSUER=issuer export OTHER=1",
    "yaml-list": "- BROKER_SESSION_LIMITS=1/day",
    "json": '"BROKER_SESSION_LIMITS": "1/day",',
    "plus": "BROKER_SESSION_LIMITS+=1/day",
    "variable-that-is-not-set": "BROKER_SESSION_LIMITS=${LIMITS}",
    "of-others-too": "these words are no setting",
}


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""], ids=["lf", "crlf", "no-end"])
@pytest.mark.parametrize("line", REFUSED.values(), ids=REFUSED.keys())
def test_a_line_that_is_none_of_them(line: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / ".env"
    above = f"# settings{ending or chr(10)}{ending or chr(10)}"
    file.write_bytes((above + line.replace("\n", ending or "\n") + ending).encode())

    with pytest.raises(SettingsError) as refused:
        load_settings(NEEDED, file)

    assert refused.value.lines[0].startswith(f"{file}: line 3 ")
    assert "1/day" not in "".join(refused.value.lines)


def test_every_such_line_is_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("one\nBROKER_DOCS=false\n\ntwo: 2\nBROKER_NO_SUCH=1\n")

    with pytest.raises(SettingsError) as refused:
        load_settings({}, file)

    assert [line.partition(";")[0] for line in refused.value.lines] == [
        f"{file}: line 1 is not a setting, a comment or blank",
        f"{file}: line 4 is not a setting, a comment or blank",
        "BROKER_NO_SUCH: is not a setting",
        "ONEINBOX_AGENT_ID: is required unless BROKER_AGENTS_FILE is set",
        "ONEINBOX_API_KEY: is required (a secret key, oi_sk_…). No key yet? Try `oneinbox-broker sandbox`.",
    ]


READ = {
    "comments": ("# BROKER_DOCS=1 BROKER_X=2\n\n  # more\nBROKER_DOCS=false # why", "docs", False),
    "blanks": ("  BROKER_DOCS = false  ", "docs", False),
    "export": ("export BROKER_DOCS=false", "docs", False),
    "quotes": ("BROKER_DOCS='false'", "docs", False),
    "byte-order-mark": ("\ufeffBROKER_DOCS=false", "docs", False),
    "old-mac": ("BROKER_LOG_LEVEL=error\rBROKER_DOCS=false\r", "docs", False),
    "variable": ("LIMITS=1/day\nBROKER_SESSION_LIMITS=${LIMITS}", "session_limits", "1/day"),
    "variable-with-default": ("BROKER_SESSION_LIMITS=${NONE:-2/day}", "session_limits", "2/day"),
    "variable-in-double-quotes": ('LIMITS=1/day\nBROKER_SESSION_LIMITS="${LIMITS}"', "session_limits", "1/day"),
    "no-variable-in-single-quotes": ("BROKER_JWT_ISSUER='a${b}'", "jwt_issuer", "a${b}"),
    "list-with-blanks": ("BROKER_ALLOWED_VARIABLES=a, b", "allowed_variables", ["a", "b"]),
    "of-others": ("JAVA_OPTS=-Xmx1g -Dx=1\nURL=postgres://u:p@h/d?a=b c=d\nBROKER_DOCS=0", "docs", False),
    "last-counts": ("BROKER_DOCS=true\nBROKER_DOCS=false", "docs", False),
    "null-device": ("", "docs", True),
}


@pytest.mark.parametrize(("text", "field", "value"), READ.values(), ids=READ.keys())
def test_what_is_read(text: str, field: str, value: object, tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes(text.encode())

    mode = {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": "s" * 32}
    assert getattr(load_settings({**NEEDED, **mode}, file), field) == value


def test_pairs_of_a_list_are_not_two_settings(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(
        "BROKER_AUTH=jwt\nBROKER_JWT_SECRET=a-secret-of-more-than-32-characters\nBROKER_VARIABLES_FROM_CLAIMS=a=b, c=d"
    )

    assert load_settings(NEEDED, file).variables_from_claims == {"a": "b", "c": "d"}


def test_a_value_of_several_lines(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes(b'BROKER_SECRET="' + b"a" * 32 + b"\r\n" + b"b" * 32 + b'"\r\nBROKER_DOCS=false\r\n')

    settings = load_settings(NEEDED, file)

    assert settings.secret is not None
    assert settings.secret.get_secret_value() == "a" * 32 + "\n" + "b" * 32
    assert settings.docs is False


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"BROKER_DOCS=\xff")

    for name in ("loop", "dangling", "pipe", "binary", "x" * 300):
        with pytest.raises(SettingsError) as refused:
            load_settings({}, tmp_path / name)  # what is missing may be in it: the one line says enough
        [line] = refused.value.lines
        assert line.startswith(f"{tmp_path / name}: cannot be read (")


def test_files_in_which_nothing_matters(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    for path in (tmp_path / "empty", tmp_path / "none", tmp_path, Path(os.devnull)):
        assert load_settings(NEEDED, path) == load_settings(NEEDED, None)
