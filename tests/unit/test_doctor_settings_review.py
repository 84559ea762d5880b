"""Settings that are allowed and worth a second thought."""

import resource

import pytest

from app.doctor.settings_review import review, settings_warnings
from tests.support.harness import settings

QUIET = {
    "BROKER_ALLOWED_ORIGINS": "https://www.example.com",
    "BROKER_ALLOWED_VARIABLES": "customer_name",
    "BROKER_SECRET": "s" * 32,
    "BROKER_STORE_URL": "redis://127.0.0.1:1",
    "BROKER_MAX_WAITING": "1",
    "BROKER_MAX_STREAMS_TOTAL": "1",
}


JWT = {"BROKER_AUTH": "jwt"}
KEY_SET = {"BROKER_JWT_JWKS_URL": "https://login.example/keys", "BROKER_JWT_ISSUER": "https://login.example"}


def levels(**changes: str) -> dict[str, str]:
    """What is not ok, by name."""
    return {finding.name: finding.level for finding in review(settings(QUIET | changes)) if finding.level != "ok"}


def test_nothing_to_say() -> None:
    assert levels() == {}
    assert settings_warnings(settings(QUIET), "127.0.0.1") == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"BROKER_ALLOWED_ORIGINS": ""}, {"allowed origins": "warning"}),
        ({"BROKER_ALLOWED_ORIGINS": "*"}, {"allowed origins": "warning"}),
        ({"BROKER_ALLOWED_ORIGINS": "https://a.example,http://b.example"}, {"allowed origins": "warning"}),
        ({"BROKER_ALLOWED_ORIGINS": "http://localhost:*,http://[::1]:3000"}, {}),
        ({"BROKER_TRUSTED_PROXIES": "10.0.0.0/8,fc00::/7,203.0.113.0/24"}, {}),
        ({"BROKER_TRUSTED_PROXIES": "10.0.0.0/8,0.0.0.0/0"}, {"trusted proxies": "error"}),
        ({"BROKER_TRUSTED_PROXIES": "::/0"}, {"trusted proxies": "error"}),
        ({"BROKER_TRUSTED_PROXIES": "0.0.0.0/1,128.0.0.0/1"}, {"trusted proxies": "warning"}),
        ({"BROKER_TRUSTED_PROXIES": "2000::/3"}, {"trusted proxies": "warning"}),
        ({"BROKER_PUBLIC_URL": "https://voice.example"}, {"trusted proxies": "warning"}),
        ({"BROKER_PUBLIC_URL": "https://voice.example", "BROKER_TRUSTED_PROXIES": "10.0.0.1"}, {}),
        (
            {"BROKER_PUBLIC_URL": "https://voice.example/voice", "BROKER_TRUSTED_PROXIES": "10.0.0.1"},
            {"prefix": "warning"},
        ),
        (
            {
                "BROKER_PUBLIC_URL": "https://voice.example/voice",
                "BROKER_ROOT_PATH": "/voice",
                "BROKER_TRUSTED_PROXIES": "10.0.0.1",
            },
            {},
        ),
        ({"BROKER_CLIENT_IP_HEADER": "Fly-Client-IP"}, {"trusted proxies": "warning"}),
        ({"BROKER_CLIENT_IP_HEADER": "Fly-Client-IP", "BROKER_TRUSTED_PROXIES": "10.0.0.1"}, {}),
        (
            {"BROKER_CLIENT_IP_HEADER": "Fly-Client-IP", "BROKER_TRUSTED_PROXIES": "0.0.0.0/0"},
            {"trusted proxies": "error"},
        ),
        ({**JWT, "BROKER_JWT_SECRET": "x" * 32}, {}),
        ({**JWT, "BROKER_JWT_PUBLIC_KEY": "k"}, {"tokens": "warning"}),
        ({**JWT, "BROKER_JWT_PUBLIC_KEY": "k", "BROKER_JWT_AUDIENCE": "voice"}, {}),
        ({**JWT, "BROKER_JWT_PUBLIC_KEY": "k", "BROKER_JWT_REQUIRED_CLAIMS": "typ=Bearer"}, {"tokens": "warning"}),
        ({**JWT, **KEY_SET, "BROKER_JWT_REQUIRED_CLAIMS": "token_use=access"}, {"tokens": "warning"}),
        ({**JWT, **KEY_SET, "BROKER_JWT_REQUIRED_CLAIMS": "token_use=access,client_id=abc"}, {}),
        ({**JWT, **KEY_SET, "BROKER_JWT_REQUIRED_CLAIMS": "azp=https://www.example.com"}, {}),
        ({"BROKER_ALLOWED_VARIABLES": "*"}, {"variables": "warning"}),
        ({"BROKER_ALLOWED_VARIABLES": ""}, {}),
        ({"BROKER_LIMITS_MODE": "observe"}, {"limits": "warning"}),
        ({"BROKER_SECRET": "", "BROKER_STORE_URL": ""}, {"secret": "warning"}),
    ],
)
def test_second_thoughts(changes: dict[str, str], expected: dict[str, str]) -> None:
    assert levels(**changes) == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "share its limits"),
        ({"BROKER_CLIENT_IP_HEADER": "Fly-Client-IP"}, "can claim any address in Fly-Client-IP"),
        ({"BROKER_AUTH": "header"}, "can claim to be any user"),
    ],
)
def test_trusting_everyone_means_something_else_in_each_case(changes: dict[str, str], said: str) -> None:
    everyone = settings(QUIET | changes | {"BROKER_TRUSTED_PROXIES": "0.0.0.0/0"})
    [finding] = [finding for finding in review(everyone) if finding.name == "trusted proxies"]

    assert said in finding.detail


@pytest.mark.parametrize(("allowed", "expected"), [(602, {"open files": "warning"}), (603, {}), (-1, {})])
def test_open_files(monkeypatch: pytest.MonkeyPatch, allowed: int, expected: dict[str, str]) -> None:
    def limits(_: int) -> tuple[int, int]:
        return allowed, allowed

    monkeypatch.setattr(resource, "getrlimit", limits)
    monkeypatch.setattr(resource, "RLIM_INFINITY", -1)
    assert levels() == expected


@pytest.mark.parametrize(
    ("host", "changes", "warned"),
    [
        ("0.0.0.0", {}, True),
        ("::", {}, True),
        ("127.0.0.1", {}, False),
        ("::1", {}, False),
        ("localhost", {}, False),
        ("0.0.0.0", {"BROKER_CHALLENGE_SECRET": "secret"}, False),
        ("0.0.0.0", {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": "x" * 32}, False),
    ],
)
def test_a_public_broker_without_logins(host: str, changes: dict[str, str], warned: bool) -> None:
    names = [caution.name for caution in settings_warnings(settings(QUIET | changes), host)]
    assert names == (["anonymous and public"] if warned else [])


def test_what_it_means_to_trust_everybody() -> None:
    header = {"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": "0.0.0.0/0"}
    details = {finding.name: finding.detail for finding in review(settings(QUIET | header))}
    assert "any user in a header" in details["trusted proxies"]
    del header["BROKER_AUTH"]
    details = {finding.name: finding.detail for finding in review(settings(QUIET | header))}
    assert "share its limits" in details["trusted proxies"]


def test_what_a_token_needs() -> None:
    changes = {
        "BROKER_JWT_AUDIENCE": "voice,chat",
        "BROKER_JWT_REQUIRED_CLAIMS": "azp=https://a.example|https://b.example,/o/id=org_1",
    }
    details = {finding.name: finding.detail for finding in review(settings(QUIET | JWT | KEY_SET | changes))}
    assert details["tokens"] == "need aud voice or chat, azp https://a.example or https://b.example, /o/id org_1"


def test_memory_is_a_caution() -> None:
    (caution,) = settings_warnings(settings(QUIET | {"BROKER_STORE_URL": "memory://"}), "127.0.0.1")
    assert caution.name == "store"
    assert "a restart forgets" in caution.detail
