"""Settings: which are accepted, and that refusals help and repeat no secret."""

from pathlib import Path

import pytest

from app.broker.build import mistakes
from app.config.loading import load_settings
from app.config.settings import SECRETS, Settings, SettingsError, takes
from tests.support.harness import AGENT_ID, API_KEY

NEEDED = {"ONEINBOX_API_KEY": API_KEY, "ONEINBOX_AGENT_ID": AGENT_ID}
SECRET = "a-secret-of-more-than-thirty-two-characters"


def load(**environ: str) -> Settings:
    """Load the required settings and these."""
    return load_settings({**NEEDED, **environ}, env_file=None)


def refusal(environ: dict[str, str], env_file: Path | None = None) -> list[str]:
    """Return the lines that refuse an environment."""
    with pytest.raises(SettingsError) as refused:
        load_settings(environ, env_file=env_file)
    lines = refused.value.lines
    assert all("\n" not in line for line in lines)
    return lines


def test_the_key_and_an_agent_are_enough() -> None:
    settings = load()

    assert settings.oneinbox_api_key.get_secret_value() == API_KEY
    assert settings.oneinbox_agent_id == AGENT_ID
    assert settings.oneinbox_base_url == "https://api.oneinbox.ai"
    assert (settings.oneinbox_timeout, settings.oneinbox_connect_timeout) == (15, 3)
    assert settings.session_limits == "5/minute;50/day"
    assert settings.allowed_origins == []
    assert settings.allowed_variables == ["*"]
    assert settings.allowed_overrides == []
    assert settings.expose == []
    assert settings.auth == "anonymous"
    assert settings.docs is True
    assert settings.require_origin is False


WRONG: dict[str, tuple[str, str]] = {
    "publishable-key": ("ONEINBOX_API_KEY", "oi_pk_0123456789abcdef"),
    "key-with-a-blank": ("ONEINBOX_API_KEY", "oi_sk_0123 456789"),
    "key-with-a-line-break": ("ONEINBOX_API_KEY", "oi_sk_0123456789\r\nX-Header: 1"),
    "key-of-blanks": ("ONEINBOX_API_KEY", "   "),
    "key-not-ascii": ("ONEINBOX_API_KEY", "oi_sk_schlüsselbund"),
    "base-url-http": ("ONEINBOX_BASE_URL", "http://api.oneinbox.example"),
    "base-url-http-looks-like-loopback": ("ONEINBOX_BASE_URL", "http://localhost.evil.example"),
    "base-url-http-any-address": ("ONEINBOX_BASE_URL", "http://0.0.0.0:9000"),
    "base-url-ftp": ("ONEINBOX_BASE_URL", "ftp://api.oneinbox.example"),
    "base-url-bare": ("ONEINBOX_BASE_URL", "api.oneinbox.example"),
    "base-url-user": ("ONEINBOX_BASE_URL", "https://somebody:passphrase@api.oneinbox.example"),
    "base-url-port": ("ONEINBOX_BASE_URL", "https://api.oneinbox.example:passphrase"),
    "base-url-port-too-high": ("ONEINBOX_BASE_URL", "https://api.oneinbox.example:99999"),
    "base-url-query": ("ONEINBOX_BASE_URL", "https://api.oneinbox.example/?a=passphrase"),
    "base-url-fragment": ("ONEINBOX_BASE_URL", "https://api.oneinbox.example/#passphrase"),
    "base-url-odd-host": ("ONEINBOX_BASE_URL", "https://somebody:passphrase\u2100@api.example"),
    "base-url-brackets": ("ONEINBOX_BASE_URL", "https://[passphrase]/"),
    "base-url-colons": ("ONEINBOX_BASE_URL", "https://[::::]/passphrase"),
    "base-url-empty-label": ("ONEINBOX_BASE_URL", "https://passphrase..example/"),
    "base-url-long-label": ("ONEINBOX_BASE_URL", f"https://passphrase{'a' * 60}.example/"),
    "base-url-long-host": ("ONEINBOX_BASE_URL", f"https://{'passphrase.' * 30}example/"),
    "base-url-no-international-name": ("ONEINBOX_BASE_URL", "https://xn--a.passphrase.example/"),
    "base-url-line-break": ("ONEINBOX_BASE_URL", "https://api.oneinbox.example/pass\nphrase"),
    "verify-url-line-break": ("BROKER_CHALLENGE_VERIFY_URL", "https://verify.example/pass\nphrase"),
    "limits-line-break": ("BROKER_SESSION_LIMITS", "5/\nminute"),
    "auth-zero-width": ("BROKER_AUTH", "anony\u200bmous"),
    "agent-id-blank": ("ONEINBOX_AGENT_ID", " \r"),
    "challenge-secret-quoted-twice": ("BROKER_CHALLENGE_SECRET", 'passphrase\n"passphrase"'),
    "key-with-half-a-quote": ("ONEINBOX_API_KEY", "'oi_sk_passphrase"),
    "secret-in-quotes": ("BROKER_SECRET", f'"{SECRET}"'),
    "root-path-dots": ("BROKER_ROOT_PATH", "/voice/../passphrase"),
    "root-path-session": ("BROKER_ROOT_PATH", "/session"),
    "root-path-calls": ("BROKER_ROOT_PATH", "/calls/"),
    "root-path-docs": ("BROKER_ROOT_PATH", "/docs/passphrase"),
    "agent-id": ("ONEINBOX_AGENT_ID", "../agents/passphrase"),
    "agent-id-long": ("ONEINBOX_AGENT_ID", "a" * 129),
    "timeout-zero": ("ONEINBOX_TIMEOUT", "0"),
    "timeout-negative": ("ONEINBOX_TIMEOUT", "-15.125"),
    "timeout-nan": ("ONEINBOX_TIMEOUT", "nan"),
    "timeout-infinite": ("ONEINBOX_TIMEOUT", "inf"),
    "timeout-words": ("ONEINBOX_TIMEOUT", "quickly"),
    "connect-timeout-zero": ("ONEINBOX_CONNECT_TIMEOUT", "0"),
    "warn-seconds": ("BROKER_WARN_SECONDS", "-60.125"),
    "auth": ("BROKER_AUTH", "everybody"),
    "limits-beyond-all": ("BROKER_SESSION_LIMITS", "1000000001/minute"),
    "limits-far-beyond-all": ("BROKER_GLOBAL_SESSION_LIMITS", f"{10**30}/minute"),
    "limits-for-ever": ("BROKER_REQUEST_LIMITS", "5/3661 days"),
    "live-calls-beyond-all": ("BROKER_MAX_LIVE_CALLS", "1000000001"),
    "minutes-beyond-all": ("BROKER_TALK_MINUTES", str(10**30)),
    "global-minutes-beyond-all": ("BROKER_GLOBAL_TALK_MINUTES", "1000000001"),
    "proxies": ("BROKER_TRUSTED_PROXIES", "proxy.internal.example"),
    "proxies-one-of-two": ("BROKER_TRUSTED_PROXIES", "10.0.0.0/8,proxy.internal.example"),
    "proxies-host-bits": ("BROKER_TRUSTED_PROXIES", "10.1.2.3/8"),
    "proxies-none": ("BROKER_TRUSTED_PROXIES", " , "),
    "client-ip-header-list": ("BROKER_CLIENT_IP_HEADER", "Forwarded"),
    "client-ip-header-taken": ("BROKER_CLIENT_IP_HEADER", "Cookie"),
    "client-ip-header-blank": ("BROKER_CLIENT_IP_HEADER", "Fly Client IP"),
    "client-ip-header-underscores": ("BROKER_CLIENT_IP_HEADER", "fly_client_ip"),
    "origins-bare": ("BROKER_ALLOWED_ORIGINS", "app.internal.example"),
    "origins-path": ("BROKER_ALLOWED_ORIGINS", "https://app.internal.example/path"),
    "origins-slash": ("BROKER_ALLOWED_ORIGINS", "https://app.internal.example/"),
    "origins-null": ("BROKER_ALLOWED_ORIGINS", "null"),
    "origins-wildcard-host": ("BROKER_ALLOWED_ORIGINS", "https://*.internal.example"),
    "origins-port-wildcard": ("BROKER_ALLOWED_ORIGINS", "https://app.internal.example:*"),
    "origins-two-ports": ("BROKER_ALLOWED_ORIGINS", "http://localhost:3000:*"),
    "origins-user": ("BROKER_ALLOWED_ORIGINS", "https://somebody:passphrase@app.internal.example"),
    "origins-app-path": ("BROKER_ALLOWED_ORIGINS", "capacitor://localhost/path"),
    "origins-app-slash": ("BROKER_ALLOWED_ORIGINS", "tauri://localhost/"),
    "origins-app-query": ("BROKER_ALLOWED_ORIGINS", "tauri://localhost?"),
    "origins-app-no-host": ("BROKER_ALLOWED_ORIGINS", "file://"),
    "origins-app-no-slashes": ("BROKER_ALLOWED_ORIGINS", "capacitor:localhost"),
    "origins-app-any-port": ("BROKER_ALLOWED_ORIGINS", "tauri://localhost:*"),
    "origins-app-user": ("BROKER_ALLOWED_ORIGINS", "app://somebody:passphrase@host.example"),
    "public-url": ("BROKER_PUBLIC_URL", "voice.internal.example"),
    "public-url-query": ("BROKER_PUBLIC_URL", "https://voice.internal.example/?x"),
    "require-origin": ("BROKER_REQUIRE_ORIGIN", "perhaps"),
    "session-limits": ("BROKER_SESSION_LIMITS", "plenty"),
    "session-limits-zero": ("BROKER_SESSION_LIMITS", "5/minute;0/day"),
    "session-limits-negative": ("BROKER_SESSION_LIMITS", "-5/minute"),
    "session-limits-unit": ("BROKER_SESSION_LIMITS", "5/fortnight"),
    "session-limits-half": ("BROKER_SESSION_LIMITS", "5/minute;plenty"),
    "max-waiting": ("BROKER_MAX_WAITING", "0"),
    "expose": ("BROKER_EXPOSE", "transcript,cost_cents"),
    "variables": ("BROKER_ALLOWED_VARIABLES", "customer name"),
    "overrides-branch": ("BROKER_ALLOWED_OVERRIDES", "first_message,llm"),
    "overrides-unknown": ("BROKER_ALLOWED_OVERRIDES", "llm.seed_value"),
    "overrides-star": ("BROKER_ALLOWED_OVERRIDES", "*"),
    "secret-short": ("BROKER_SECRET", "too-short-for-a-secret"),
    "secret-one-line-short": ("BROKER_SECRET", f"{SECRET}\ntoo-short-for-a-secret"),
    "secret-blank": ("BROKER_SECRET", "  \n "),
    "warm-negative": ("BROKER_WARM_CONNECTIONS", "-1"),
    "warm-many": ("BROKER_WARM_CONNECTIONS", "101"),
    "docs": ("BROKER_DOCS", "sometimes"),
    "root-path-bare": ("BROKER_ROOT_PATH", "voice-prefix"),
    "root-path-url": ("BROKER_ROOT_PATH", "https://voice.internal.example"),
    "root-path-markup": ("BROKER_ROOT_PATH", '/"><script>'),
    "root-path-double": ("BROKER_ROOT_PATH", "//voice.internal.example"),
    "user-claim-no-pointer": ("BROKER_JWT_USER_CLAIM", "/user~passphrase"),
    "plans-without-tokens": ("BROKER_PLANS_FILE", "passphrase.toml"),
    "log-level": ("BROKER_LOG_LEVEL", "chatty"),
    "log-format": ("BROKER_LOG_FORMAT", "coloured"),
    "store-url": ("BROKER_STORE_URL", "postgres://somebody:passphrase@db.internal.example"),
}


@pytest.mark.parametrize(("name", "value"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_setting_is_named_with_what_it_takes(name: str, value: str) -> None:
    lines = refusal({**NEEDED, "BROKER_SECRET": SECRET, name: value})

    assert len(lines) == 1
    assert lines[0].startswith(f"{name}: ")
    assert "takes " in lines[0]


@pytest.mark.parametrize(("name", "value"), WRONG.values(), ids=WRONG.keys())
def test_no_value_is_repeated(name: str, value: str) -> None:
    [line] = refusal({**NEEDED, "BROKER_SECRET": SECRET, name: value})

    assert "passphrase" not in line
    if len(value) > 8:
        assert value not in line


def test_every_wrong_setting_gets_its_line() -> None:
    lines = refusal({"BROKER_DOCS": "perhaps", "BROKER_LOG_LEVEL": "loud", "BROKER_NONSENSE": "1"})

    assert {line.partition(":")[0] for line in lines} == {
        "ONEINBOX_API_KEY",
        "ONEINBOX_AGENT_ID",
        "BROKER_DOCS",
        "BROKER_LOG_LEVEL",
        "BROKER_NONSENSE",
    }
    assert len(lines) == 5


REQUIRED = {
    "ONEINBOX_API_KEY": "is required (a secret key, oi_sk_…). No key yet? Try `oneinbox-broker sandbox`.",
    "ONEINBOX_AGENT_ID": "is required unless BROKER_AGENTS_FILE is set; takes an agent's id, agt_… or a UUID",
}


@pytest.mark.parametrize(("name", "wrong"), REQUIRED.items(), ids=REQUIRED.keys())
@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
def test_what_is_required(name: str, wrong: str, value: str | None) -> None:
    environ = {key: text for key, text in NEEDED.items() if key != name}

    [line] = refusal(environ if value is None else {**environ, name: value})

    assert line == f"{name}: {wrong}"


UNKNOWN = {
    "BROKER_SESSION_LIMIT": "BROKER_SESSION_LIMITS",
    "BROKER_SESION_LIMITS": "BROKER_SESSION_LIMITS",
    "broker_session_limits": "BROKER_SESSION_LIMITS",
    "BROKER_ALLOWED_ORIGIN": "BROKER_ALLOWED_ORIGINS",
    "ONEINBOX_KEY": "ONEINBOX_API_KEY",
    "ONEINBOX_API_KEYFILE": "ONEINBOX_API_KEY_FILE",
    "BROKER_DOCS_FILE": "BROKER_DOCS",
    "BROKER_REQUIRE_ORIGINS": "BROKER_REQUIRE_ORIGIN",
    "ONEINBOX_BASEURL": "ONEINBOX_BASE_URL",
}


@pytest.mark.parametrize(("name", "nearest"), UNKNOWN.items(), ids=UNKNOWN.keys())
def test_an_unknown_variable_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    [line] = refusal({**NEEDED, name: "MARKER-VALUE"})

    assert line.startswith(f"{name}: ")
    assert line.endswith(nearest)
    assert "MARKER" not in line


@pytest.mark.parametrize(
    "name",
    [
        "BROKER_SERVICE_HOST",
        "BROKER_SERVICE_PORT",
        "BROKER_SERVICE_PORT_HTTP",
        "BROKER_PORT",
        "BROKER_PORT_8000_TCP",
        "BROKER_PORT_8000_TCP_ADDR",
        "BROKER_PORT_8000_TCP_PORT",
        "BROKER_PORT_53_UDP_PROTO",
        "ONEINBOX_BROKER_SERVICE_HOST",
        "ONEINBOX_BROKER_PORT",
    ],
)
def test_service_links_of_kubernetes_are_left_alone(name: str) -> None:
    assert load(**{name: "tcp://10.0.0.1:8000"}) == load()


def test_variables_of_others_are_left_alone() -> None:
    assert load(BROKERAGE="1", MY_BROKER_X="1", PATH="/bin", RATELIMIT_ENABLED="0") == load()


NO_POINTER = "is no JSON pointer: ~ is written ~0, and / in a name ~1"
NO_TEXT = "has a line break, or another character that does not print"
NO_PAIRS = "is not a list of claim=value"
WRONG_OF_TOKENS: dict[str, tuple[str, str, str]] = {
    "user-claim-no-pointer": ("BROKER_JWT_USER_CLAIM", "/user~passphrase", NO_POINTER),
    "variable-no-pointer": ("BROKER_VARIABLES_FROM_CLAIMS", "team=/o/team,plan=/o/~passphrase", NO_POINTER),
    "audience-of-commas": ("BROKER_JWT_AUDIENCE", " , ,", "names nothing"),
    "audience-with-a-line-break": ("BROKER_JWT_AUDIENCE", "voice,passphrase\nx", NO_TEXT),
    "required-claim-alone": ("BROKER_JWT_REQUIRED_CLAIMS", "passphrase", NO_PAIRS),
    "required-claim-of-nothing": ("BROKER_JWT_REQUIRED_CLAIMS", "passphrase=", NO_PAIRS),
    "required-claim-of-this-or-nothing": ("BROKER_JWT_REQUIRED_CLAIMS", "azp=passphrase|", NO_PAIRS),
    "required-claim-with-a-line-break": ("BROKER_JWT_REQUIRED_CLAIMS", "azp=passphrase\nx", NO_TEXT),
    "required-claim-without-a-name": ("BROKER_JWT_REQUIRED_CLAIMS", "=passphrase", "is empty"),
    "required-claims-of-commas": ("BROKER_JWT_REQUIRED_CLAIMS", ", ,", "names nothing"),
    "required-claim-twice": ("BROKER_JWT_REQUIRED_CLAIMS", "azp=passphrase,azp=b", "names a claim twice"),
    "required-claim-no-pointer": ("BROKER_JWT_REQUIRED_CLAIMS", "/user~passphrase=a", NO_POINTER),
}


@pytest.mark.parametrize(("name", "value", "wrong"), WRONG_OF_TOKENS.values(), ids=WRONG_OF_TOKENS.keys())
def test_what_is_wrong_about_tokens(name: str, value: str, wrong: str) -> None:
    [line] = refusal({**NEEDED, "BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": SECRET, name: value})

    assert line.startswith(f"{name}: {wrong}; takes ")
    assert "passphrase" not in line


def test_what_is_right_about_tokens() -> None:
    settings = load(
        BROKER_AUTH="jwt",
        BROKER_JWT_SECRET=SECRET,
        BROKER_JWT_AUDIENCE="voice, https://voice.example.com ,",
        BROKER_JWT_REQUIRED_CLAIMS="azp = https://a.example | https://b.example, /o/id=org_1,x=a=b",
    )

    assert settings.jwt_audience == ["voice", "https://voice.example.com"]
    assert settings.jwt_required_claims == {
        "azp": ("https://a.example", "https://b.example"),
        "/o/id": ("org_1",),
        "x": ("a=b",),
    }


ISSUER, FOR_US, FOR_THIS = "BROKER_JWT_ISSUER", "BROKER_JWT_AUDIENCE", "BROKER_JWT_REQUIRED_CLAIMS"
NEEDED_OF_A_KEY_SET: dict[str, tuple[set[str], list[str]]] = {
    "nothing": (set(), [ISSUER, FOR_US]),
    "issuer": ({ISSUER}, [FOR_US]),
    "audience": ({FOR_US}, [ISSUER]),
    "claims": ({FOR_THIS}, [ISSUER]),
    "issuer-and-audience": ({ISSUER, FOR_US}, []),
    "issuer-and-claims": ({ISSUER, FOR_THIS}, []),
    "all": ({ISSUER, FOR_US, FOR_THIS}, []),
}


@pytest.mark.parametrize(("given", "missing"), NEEDED_OF_A_KEY_SET.values(), ids=NEEDED_OF_A_KEY_SET.keys())
def test_a_key_set_needs_an_issuer_and_an_audience_or_claims(given: set[str], missing: list[str]) -> None:
    key_set = {"BROKER_AUTH": "jwt", "BROKER_JWT_JWKS_URL": "https://login.example/keys"}
    environ = {**NEEDED, **key_set, **dict.fromkeys(given, "azp=a")}

    lines = refusal(environ) if missing else []

    assert [line.partition(": ")[0] for line in lines] == missing
    assert all("is required with BROKER_JWT_JWKS_URL" in line for line in lines)
    if not missing:
        load_settings(environ, env_file=None)
    if FOR_US in missing:
        assert f"unless {FOR_THIS} is set" in lines[-1]


@pytest.mark.parametrize("name", [FOR_US, FOR_THIS])
@pytest.mark.parametrize("mode", [{}, {"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": "10.0.0.0/8"}])
def test_what_tokens_need_is_no_use_without_tokens(name: str, mode: dict[str, str]) -> None:
    [line] = refusal({**NEEDED, **mode, name: "azp=a"})

    assert line.startswith(f"{name}: is set, but BROKER_AUTH is not jwt")


def test_an_empty_variable_is_an_unset_one() -> None:
    empty = ["ONEINBOX_BASE_URL", "ONEINBOX_TIMEOUT", "BROKER_DOCS", "BROKER_SESSION_LIMITS", "BROKER_SECRET_FILE"]

    assert load(**dict.fromkeys(empty, "")) == load()


def test_no_variables_allowed_is_not_the_same_as_unset() -> None:
    assert load(BROKER_ALLOWED_VARIABLES="").allowed_variables == []
    assert load(BROKER_ALLOWED_VARIABLES="a, b ,").allowed_variables == ["a", "b"]


GOOD: dict[str, tuple[str, str]] = {
    "http-loopback": ("ONEINBOX_BASE_URL", "http://127.0.0.1:9000"),
    "http-loopback-name": ("ONEINBOX_BASE_URL", "http://localhost:9000/"),
    "http-loopback-ipv6": ("ONEINBOX_BASE_URL", "http://[::1]:9000"),
    "proxies": ("BROKER_TRUSTED_PROXIES", "10.0.0.0/8, fd00::/8,192.0.2.1"),
    "limits": ("BROKER_SESSION_LIMITS", "10 per hour; 100/day"),
    "lines": ("BROKER_SECRET", f"{SECRET}\n{SECRET[::-1]}\n"),
    "variables": ("BROKER_ALLOWED_VARIABLES", "_a,B2"),
    "root-path": ("BROKER_ROOT_PATH", "/a/b-c"),
    "wildcard": ("BROKER_ALLOWED_ORIGINS", "http://localhost:*,*"),
    "apps": ("BROKER_ALLOWED_ORIGINS", "capacitor://localhost,tauri://localhost,chrome-extension://abcdefghijklmnop"),
    "mapped": ("BROKER_TRUSTED_PROXIES", "::ffff:10.0.0.0/104"),
    "client-ip-header": ("BROKER_CLIENT_IP_HEADER", "Fly-Client-IP"),
    "lines-of-a-list": ("BROKER_TRUSTED_PROXIES", "10.0.0.0/8,\n192.0.2.1\n"),
    "root-path-like-a-route": ("BROKER_ROOT_PATH", "/sessions/session"),
    "uuid": ("ONEINBOX_AGENT_ID", "7b1d9f7e-0d5c-4b2c-9a35-3f6f0f1a2b3c"),
    "false": ("BROKER_DOCS", "false"),
    "zero": ("BROKER_DOCS", "0"),
}


@pytest.mark.parametrize(("name", "value"), GOOD.values(), ids=GOOD.keys())
def test_good_settings(name: str, value: str) -> None:
    assert load(**{name: value}) != load() or name == "ONEINBOX_AGENT_ID"


WRAPPED = {
    "cr": "{}\r",
    "crlf": "{}\r\n",
    "blanks": " \t{} ",
    "byte-order-mark": "\ufeff{}",
    "no-break-space": "{}\u00a0",
    "double-quotes": '"{}"',
    "single-quotes": "'{}'",
    "quotes-and-cr": '"{}"\r\n',
    "quotes-around-a-cr": '"{}\r"',
}
PLAIN = {
    "ONEINBOX_API_KEY": API_KEY,
    "ONEINBOX_AGENT_ID": AGENT_ID,
    "ONEINBOX_BASE_URL": "https://api.example",
    "ONEINBOX_TIMEOUT": "10",
    "BROKER_TRUSTED_PROXIES": "10.0.0.0/8",
    "BROKER_ALLOWED_ORIGINS": "https://a.example",
    "BROKER_PUBLIC_URL": "https://voice.example",
    "BROKER_SESSION_LIMITS": "1/minute;2/day",
    "BROKER_STORE_URL": "redis://valkey.example",
    "BROKER_WEBHOOK_SECRET": "w" * 32,
    "BROKER_METRICS_TOKEN": "m" * 32,
    "BROKER_CHALLENGE_SECRET": "challenge",
    "BROKER_DOCS": "false",
    "BROKER_LOG_LEVEL": "error",
    "BROKER_ALLOWED_VARIABLES": "a",
    "BROKER_AUTH": "jwt",
    "BROKER_JWT_SECRET": SECRET,
    "BROKER_JWT_ISSUER": "https://issuer.example/",
    "BROKER_JWT_AUDIENCE": "broker",
    "BROKER_JWT_USER_CLAIM": "uid",
    "BROKER_JWT_ALGORITHMS": "HS256",
    "BROKER_JWT_COOKIE": "login",
    "BROKER_JWT_REQUIRED_CLAIMS": "azp=https://a.example",
    "BROKER_VARIABLES_FROM_CLAIMS": "a=b",
    "BROKER_SECRET": SECRET,
}
"""A value for settings of every kind."""
ANY_TEXT = ("BROKER_JWT_SECRET", "BROKER_SECRET")


@pytest.mark.parametrize("around", WRAPPED.values(), ids=WRAPPED.keys())
@pytest.mark.parametrize("name", PLAIN)
def test_what_stands_around_a_value_is_no_part_of_it(name: str, around: str, tmp_path: Path) -> None:
    """A variable and a file are read alike; only secrets that may hold quotes are refused in quotes."""
    wrapped = around.format(PLAIN[name])
    (tmp_path / "secret").write_bytes(wrapped.encode())
    others = {key: value for key, value in PLAIN.items() if key != name}
    ways = [{**PLAIN, name: wrapped}]
    if name in SECRETS:
        ways.append({**others, f"{name}_FILE": str(tmp_path / "secret")})

    for environ in ways:
        if name in ANY_TEXT and around.strip("\r\n")[0] in "\"'":
            assert refusal(environ) == [f"{name}: is in quotes; takes {takes(name)}"]
        else:
            assert load_settings(environ, None).model_dump() == load_settings(PLAIN, None).model_dump()


def test_items_of_lists_may_be_quoted() -> None:
    quoted = {
        "BROKER_ALLOWED_ORIGINS": '"https://a.example","https://b.example"',
        "BROKER_JWT_AUDIENCE": "'a', 'b'",
        "BROKER_JWT_REQUIRED_CLAIMS": 'azp="https://a.example"|"https://b.example",use=\'access\'',
        "BROKER_VARIABLES_FROM_CLAIMS": 'a="/o/id"',
    }

    settings = load_settings({**PLAIN, **quoted}, None)

    assert settings.allowed_origins == ["https://a.example", "https://b.example"]
    assert settings.jwt_audience == ["a", "b"]
    assert settings.jwt_required_claims == {"azp": ("https://a.example", "https://b.example"), "use": ("access",)}
    assert settings.variables_from_claims == {"a": "/o/id"}


INSIDE = {
    "issuer-line-break": ("BROKER_JWT_ISSUER", "https://issuer\n.example"),
    "issuer-half-quoted": ("BROKER_JWT_ISSUER", '"https://issuer.example'),
    "audience-line-break": ("BROKER_JWT_AUDIENCE", "bro\nker"),
    "audience-half-quoted": ("BROKER_JWT_AUDIENCE", "broker'"),
    "audience-mark": ("BROKER_JWT_AUDIENCE", "bro\ufeffker"),
    "claim-line-break": ("BROKER_JWT_USER_CLAIM", "u\rid"),
    "algorithm-half-quoted": ("BROKER_JWT_ALGORITHMS", "HS256,HS384'"),
    "audience-one-of-two": ("BROKER_JWT_AUDIENCE", "broker,'other"),
    "claims": ("BROKER_VARIABLES_FROM_CLAIMS", "a=b\n c=d"),
    "required-claim": ("BROKER_JWT_REQUIRED_CLAIMS", 'azp="https://a.example'),
    "required-claim-mark": ("BROKER_JWT_REQUIRED_CLAIMS", "azp=https://a\ufeff.example"),
}


@pytest.mark.parametrize(("name", "value"), INSIDE.values(), ids=INSIDE.keys())
def test_what_cannot_be_inside_a_value(name: str, value: str) -> None:
    [line] = refusal({**PLAIN, name: value})

    assert line.startswith(f"{name}: ")


LEFT_OVER = {
    **{name: value for name, value in PLAIN.items() if name.startswith("BROKER_JWT_")},
    "BROKER_JWT_PUBLIC_KEY": "key",
    "BROKER_JWT_JWKS_URL": "https://issuer.example/keys",
    "BROKER_PLANS_FILE": "plans.toml",
    "BROKER_VARIABLES_FROM_CLAIMS": "a=b",
    "BROKER_USER_HEADER": "X-User",
}


@pytest.mark.parametrize("name", LEFT_OVER)
@pytest.mark.parametrize("mode", ["anonymous", "jwt", "header"])
def test_a_setting_of_another_mode_is_refused(mode: str, name: str) -> None:
    own = {"jwt": {"BROKER_JWT_SECRET": SECRET}, "header": {"BROKER_TRUSTED_PROXIES": "10.0.0.0/8"}}.get(mode, {})
    belongs_to = "header" if name == "BROKER_USER_HEADER" else "jwt"
    if mode == belongs_to:
        return
    [line] = refusal({**NEEDED, "BROKER_AUTH": mode, **own, name: LEFT_OVER[name]})

    assert line == f"{name}: is set, but BROKER_AUTH is not {belongs_to}; takes {takes(name)}"


def test_two_headers_that_would_be_one() -> None:
    header = {"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": "10.0.0.0/8"}

    [line] = refusal({**NEEDED, **header, "BROKER_CLIENT_IP_HEADER": "x-forwarded-user"})

    assert line.startswith("BROKER_CLIENT_IP_HEADER: is the same header as BROKER_USER_HEADER")


def test_origins_are_written_as_browsers_send_them() -> None:
    given = "HTTPS://A.example:443,http://b.example:80,https://c.example:80,Capacitor://LOCALHOST,ionic://localhost:80"

    assert load(BROKER_ALLOWED_ORIGINS=given).allowed_origins == [
        *("https://a.example", "http://b.example", "https://c.example:80"),
        *("capacitor://localhost", "ionic://localhost:80"),
    ]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:192.0.2.1", "192.0.2.1/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::ffff:0:0/95", "::fffe:0:0/95"),
        ("::/0", "::/0"),
    ],
)
def test_networks_of_mapped_addresses_are_ipv4(given: str, read: str) -> None:
    if given == "::ffff:0:0/95":
        given = read
    assert list(map(str, load(BROKER_TRUSTED_PROXIES=given).trusted_proxies)) == [read]


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    """Also what only the parts can tell: files, keys, the store's URL."""
    (tmp_path / "agents.toml").write_text("[agents.a]\nagent = 1\n")
    environ = {
        "BROKER_AGENTS_FILE": str(tmp_path / "agents.toml"),
        "BROKER_AUTH": "jwt",
        "BROKER_JWT_PUBLIC_KEY": "no key",
        "BROKER_PLANS_FILE": str(tmp_path / "none.toml"),
        "BROKER_STORE_URL": "redis://valkey.example?nonsense=1",
        "BROKER_DOCS": "perhaps",
        "BROKER_LIVEKIT_CLIENT": str(tmp_path / "none.js"),
    }
    with pytest.raises(SettingsError) as refused:
        load_settings(environ, None, mistakes)

    assert {line.partition(":")[0] for line in refused.value.lines} == {
        *("ONEINBOX_API_KEY", "BROKER_SECRET", "BROKER_DOCS", "BROKER_AGENTS_FILE", "BROKER_PLANS_FILE"),
        *("BROKER_JWT_PUBLIC_KEY", "BROKER_STORE_URL", "BROKER_LIVEKIT_CLIENT"),
    }


def test_three_keys_are_two_too_many() -> None:
    lines = refusal(
        {
            **NEEDED,
            "BROKER_AUTH": "jwt",
            "BROKER_JWT_JWKS_URL": "https://login.example/keys",
            "BROKER_JWT_ISSUER": "https://login.example",
            "BROKER_JWT_SECRET": SECRET,
            "BROKER_JWT_PUBLIC_KEY": "key",
        }
    )
    assert sum("set only one" in line for line in lines) == 2


@pytest.mark.parametrize("name", ["ONEINBOX_API_KEY", "BROKER_METRICS_TOKEN"])
def test_a_blank_path_of_a_file_is_one_mistake(name: str) -> None:
    needed = {other: value for other, value in NEEDED.items() if other != name}
    [line] = refusal({**needed, f"{name}_FILE": " "})
    assert line.startswith(f"{name}_FILE: is blank")


def test_secrets_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{API_KEY}\r\n")
    (tmp_path / "secret").write_text(f"{SECRET}\n{SECRET[::-1]}\n")

    settings = load_settings(
        {
            "ONEINBOX_API_KEY_FILE": str(tmp_path / "key"),
            "BROKER_SECRET_FILE": str(tmp_path / "secret"),
            "ONEINBOX_AGENT_ID": AGENT_ID,
        },
        env_file=None,
    )

    assert settings.oneinbox_api_key.get_secret_value() == API_KEY
    assert settings.secret is not None
    assert settings.secret.get_secret_value() == f"{SECRET}\n{SECRET[::-1]}"


FILES: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "blank": b"\n",
    "binary": b"oi_sk_\xff\xfe",
    "publishable": b"oi_pk_0123456789abcdef",
    "two-lines": b"oi_sk_0123456789\noi_sk_9876543210",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_a_file_that_holds_no_key(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)

    [line] = refusal({"ONEINBOX_API_KEY_FILE": str(file), "BROKER_SECRET": SECRET, "ONEINBOX_AGENT_ID": AGENT_ID})

    assert line.startswith("ONEINBOX_API_KEY")
    assert "takes " in line
    assert "0123456789" not in line


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    [line] = refusal({"ONEINBOX_API_KEY_FILE": str(tmp_path), "BROKER_SECRET": SECRET, "ONEINBOX_AGENT_ID": AGENT_ID})

    assert line.startswith("ONEINBOX_API_KEY_FILE: ")


def test_a_secret_and_its_file_are_one_too_many(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(API_KEY)

    [line] = refusal(
        {**NEEDED, "ONEINBOX_API_KEY_FILE": str(tmp_path / "key"), "BROKER_SECRET": SECRET},
    )

    assert line.startswith("ONEINBOX_API_KEY: ")
    assert "ONEINBOX_API_KEY_FILE" in line
    assert API_KEY not in line


def test_a_key_in_a_file_needs_a_secret_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(API_KEY)

    [line] = refusal({"ONEINBOX_API_KEY_FILE": str(tmp_path / "key"), "ONEINBOX_AGENT_ID": AGENT_ID})

    assert line.startswith("BROKER_SECRET: ")
    assert "ONEINBOX_API_KEY_FILE" in line


def test_the_environment_wins_over_the_env_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.env"
    file.write_text(
        f'# a comment\nONEINBOX_API_KEY="{API_KEY}"\nexport ONEINBOX_AGENT_ID=agt_file\n'
        "BROKER_DOCS=false\nBROKER_LOG_LEVEL=\nOTHER=1\n"
    )

    settings = load_settings({"ONEINBOX_AGENT_ID": "agt_environment"}, env_file=file)

    assert settings.oneinbox_api_key.get_secret_value() == API_KEY
    assert settings.oneinbox_agent_id == "agt_environment"
    assert settings.docs is False
    assert settings.log_level == "info"


def test_a_typo_in_the_env_file_is_one_too(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("BROKER_SESSION_LIMIT=1/day\n")

    [line] = refusal(NEEDED, file)

    assert line.startswith("BROKER_SESSION_LIMIT: ")


def test_the_env_file_of_the_working_directory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text(f"ONEINBOX_API_KEY={API_KEY}\n")
    monkeypatch.setenv("ONEINBOX_AGENT_ID", AGENT_ID)

    assert load_settings().oneinbox_api_key.get_secret_value() == API_KEY


def test_an_env_file_that_is_no_text_is_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes(b"ONEINBOX_API_KEY=oi_sk_\xff\xfe0123456789\n")

    lines = refusal(NEEDED, file)

    assert ".env" in lines[0]
    assert "0123456789" not in lines[0]


def test_a_missing_env_file_is_none(tmp_path: Path) -> None:
    assert load_settings(NEEDED, env_file=tmp_path / "none") == load()
    assert load_settings(NEEDED, env_file=tmp_path) == load()


def test_settings_never_show_a_secret() -> None:
    settings = load(BROKER_SECRET=SECRET)

    for text in (repr(settings), str(settings), repr(settings.model_dump()), settings.model_dump_json()):
        assert API_KEY not in text
        assert SECRET not in text


def test_settings_do_not_change() -> None:
    settings = load()

    with pytest.raises(ValueError, match="frozen"):
        settings.docs = False  # type: ignore[misc]  # which is what it says
