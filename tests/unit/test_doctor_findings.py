"""How the doctor's findings look to people and to programs."""

import json

from app.doctor.findings import Finding, all_ok, as_json, as_lines, as_text, fine, warning, wrong

FINDINGS = [
    fine("settings", "all valid"),
    warning("secret", "derived…", "set BROKER_SECRET"),
    wrong("store", "does not work: é", "start it"),
]


def test_a_line_each_and_one_that_sums_up() -> None:
    assert as_text(FINDINGS, encoding="utf-8", colour=False).splitlines() == [
        "✓ settings: all valid",
        "! secret: derived… → set BROKER_SECRET",
        "✗ store: does not work: é → start it",
        "1 thing is wrong; 1 warning.",
    ]


def test_ascii_where_the_terminal_has_no_check_mark() -> None:
    lines = [
        "ok settings: all valid",
        "!  secret: derived... -> set BROKER_SECRET",
        "X  store: does not work: ? -> start it",
        "1 thing is wrong; 1 warning.",
    ]
    assert as_text(FINDINGS, encoding="ascii", colour=False).splitlines() == lines
    assert as_text(FINDINGS, encoding="iso-8859-1", colour=False).splitlines() == [
        line.replace("work: ?", "work: é") for line in lines
    ]


def test_colour_is_around_the_mark_alone() -> None:
    lines = as_text(FINDINGS, encoding="utf-8", colour=True).splitlines()
    assert lines[0] == "\x1b[32m✓\x1b[0m settings: all valid"
    assert lines[1].startswith("\x1b[33m!\x1b[0m ")
    assert lines[2].startswith("\x1b[31m✗\x1b[0m ")


def test_on_a_terminal_lines_are_broken_between_words() -> None:
    findings = [warning("store", "a restart forgets what was counted", "set BROKER_STORE_URL"), FINDINGS[0]]
    assert as_lines(findings, encoding="utf-8", colour=False, width=24) == [
        "! store: a restart",
        "  forgets what was",
        "  counted",
        "  → set BROKER_STORE_URL",
        "✓ settings: all valid",
    ]
    assert as_lines(findings, encoding="ascii", colour=False, width=80)[:2] == [
        "!  store: a restart forgets what was counted",
        "   -> set BROKER_STORE_URL",
    ]


def test_no_control_character_reaches_the_terminal() -> None:
    text = as_text([wrong("a", "evil\x1b[2J\nname\x9b", "b")], encoding="utf-8", colour=False)
    assert text.splitlines()[0] == "✗ a: evil?[2J?name? → b"


def test_sums() -> None:
    def last(*findings: Finding) -> str:
        return as_text(findings, encoding="utf-8", colour=False).splitlines()[-1]

    assert last(FINDINGS[0]) == "Nothing is wrong."
    assert last(FINDINGS[1], FINDINGS[1]) == "Nothing is wrong; 2 warnings."
    assert last(FINDINGS[2]) == "1 thing is wrong."
    assert last(*FINDINGS, FINDINGS[2]) == "2 things are wrong; 1 warning."


def test_json_is_one_object_in_ascii() -> None:
    text = as_json(FINDINGS)
    assert text.isascii()
    assert json.loads(text) == {
        "ok": False,
        "checks": [
            {"name": "settings", "ok": True, "level": "ok", "detail": "all valid", "remedy": ""},
            {"name": "secret", "ok": True, "level": "warning", "detail": "derived…", "remedy": "set BROKER_SECRET"},
            {"name": "store", "ok": False, "level": "error", "detail": "does not work: é", "remedy": "start it"},
        ],
    }


def test_a_warning_is_not_wrong() -> None:
    assert all_ok(FINDINGS[:2])
    assert not all_ok(FINDINGS)
