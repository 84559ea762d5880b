"""The table of identity providers in app/client/README.md: tokens of each provider's shape, signed with our own key.

The shapes are those of the providers' documentation; nothing here asks a provider.
"""

import re
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from app.config.loading import load_settings
from tests.conftest import OpenBroker
from tests.documents import ROOT
from tests.support.harness import AGENT_ID, API_KEY, Upstream, post_session
from tests.support.shapes import assert_problem

KEY = rsa.generate_private_key(65537, 2048)
PEM = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
NEEDED = {"ONEINBOX_API_KEY": API_KEY, "ONEINBOX_AGENT_ID": AGENT_ID, "BROKER_AUTH": "jwt"}


def printed() -> dict[str, dict[str, str]]:
    """The settings of the table, by provider."""
    text = (ROOT / "app/client/README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Your identity provider\n")[2].partition("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| ")][1:]
    return {
        row[0].strip(): dict(re.findall(r"`(BROKER_[A-Z_]+)=([^`]+)`", row[1].replace("\\|", "|"))) for row in rows[1:]
    }


def clerk(**changes: Any) -> dict[str, Any]:
    issuer, session = "https://clerk.example.com", {"sid": "sess_2b", "v": 2, "sts": "active", "fva": [1, -1]}
    organization = {"o": {"id": "org_1", "slg": "example", "rol": "admin"}, "pla": "u:pro"}
    return {"iss": issuer, "sub": "user_2a", "azp": "https://www.example.com", **session, **organization, **changes}


def cognito(**changes: Any) -> dict[str, Any]:
    issuer = "https://cognito-idp.REGION.amazonaws.com/POOL_ID"
    more = {"origin_jti": "o-1", "event_id": "e-1", "jti": "j-1", "auth_time": 1, "cognito:groups": ["staff"]}
    return {"iss": issuer, "sub": "aaaa-bbbb", **more, **changes}


ACCESS = {"token_use": "access", "client_id": "APP_CLIENT_ID", "scope": "openid", "username": "ann"}
ID = {"token_use": "id", "aud": "APP_CLIENT_ID", "cognito:username": "ann", "email": "ann@example.com"}


def keycloak(**changes: Any) -> dict[str, Any]:
    issuer, roles = "https://sso.example.com/realms/REALM", {"realm_access": {"roles": ["offline_access", "voice"]}}
    more = {"jti": "j-1", "sid": "s-1", "scope": "email profile", "preferred_username": "ann"}
    return {"iss": issuer, "sub": "f1e2", "typ": "Bearer", "azp": "web-spa", **roles, **more, **changes}


AUTH0 = {
    "iss": "https://TENANT.REGION.auth0.com/",
    "sub": "auth0|655f",
    "aud": ["https://voice.example.com", "https://TENANT.REGION.auth0.com/userinfo"],
    "azp": "CLIENT_ID",
    "scope": "openid profile",
}
FIREBASE = {
    "iss": "https://securetoken.google.com/PROJECT_ID",
    "aud": "PROJECT_ID",
    "sub": "uid1",
    "user_id": "uid1",
    "auth_time": 1,
    "firebase": {"identities": {}, "sign_in_provider": "password"},
}
SUPABASE = {
    "iss": "https://PROJECT_REF.supabase.co/auth/v1",
    "aud": "authenticated",
    "sub": "7b1d9f7e-0d5c-4b2c-9a35-3f6f0f1a2b3c",
    "role": "authenticated",
    "aal": "aal1",
    "session_id": "s-1",
    "app_metadata": {"provider": "email"},
    "user_metadata": {},
    "is_anonymous": False,
}
ENTRA = {
    "iss": "https://login.microsoftonline.com/TENANT_ID/v2.0",
    "aud": "API_CLIENT_ID",
    "sub": "pairwise",
    "oid": "0000-oid",
    "tid": "TENANT_ID",
    "azp": "SPA_CLIENT_ID",
    "scp": "voice.call",
    "ver": "2.0",
}

GOOD: dict[str, dict[str, Any]] = {
    "Auth0": AUTH0,
    "Clerk": clerk(),
    "Clerk, with a JWT template": {"iss": "https://clerk.example.com", "sub": "user_2a", "aud": "oneinbox"},
    "Firebase": FIREBASE,
    "Supabase": SUPABASE,
    "Cognito": cognito(**ACCESS),
    "Cognito, with ID tokens": cognito(**ID),
    "Keycloak": keycloak(aud=["oneinbox-broker", "account"]),
    "Keycloak, without a mapper": keycloak(aud="account"),
    "Microsoft Entra ID": ENTRA,
}
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "auth0-another-api": ("Auth0", AUTH0 | {"aud": "https://other.example.com"}),
    "auth0-id-token": ("Auth0", AUTH0 | {"aud": "CLIENT_ID"}),
    "auth0-another-tenant": ("Auth0", AUTH0 | {"iss": "https://OTHER.REGION.auth0.com/"}),
    "auth0-no-slash": ("Auth0", AUTH0 | {"iss": "https://TENANT.REGION.auth0.com"}),
    "clerk-another-page": ("Clerk", clerk(azp="https://other.example.com")),
    "clerk-no-page": ("Clerk", clerk(azp=None)),
    "clerk-another-instance": ("Clerk", clerk(iss="https://clerk.other.example")),
    "clerk-no-template": ("Clerk, with a JWT template", clerk()),
    "clerk-another-template": ("Clerk, with a JWT template", GOOD["Clerk, with a JWT template"] | {"aud": "hasura"}),
    "firebase-another-project": (
        "Firebase",
        FIREBASE | {"iss": "https://securetoken.google.com/OTHER", "aud": "OTHER"},
    ),
    "firebase-session-cookie": ("Firebase", FIREBASE | {"iss": "https://session.firebase.google.com/PROJECT_ID"}),
    "supabase-another-project": ("Supabase", SUPABASE | {"iss": "https://OTHER.supabase.co/auth/v1"}),
    "supabase-api-key": ("Supabase", {"iss": "supabase", "ref": "PROJECT_REF", "role": "anon"}),
    "cognito-another-app": ("Cognito", cognito(**ACCESS | {"client_id": "OTHER"})),
    "cognito-another-pool": ("Cognito", cognito(**ACCESS, iss="https://cognito-idp.REGION.amazonaws.com/OTHER")),
    "cognito-id-token": ("Cognito", cognito(**ID)),
    "cognito-access-token": ("Cognito, with ID tokens", cognito(**ACCESS)),
    "cognito-id-token-of-another-app": ("Cognito, with ID tokens", cognito(**ID | {"aud": "OTHER"})),
    "keycloak-no-mapper": ("Keycloak", keycloak(aud="account")),
    "keycloak-no-audience": ("Keycloak", keycloak()),
    "keycloak-id-token": ("Keycloak", keycloak(aud="web-spa", typ="ID")),
    "keycloak-another-realm": (
        "Keycloak",
        keycloak(aud="oneinbox-broker", iss="https://sso.example.com/realms/OTHER"),
    ),
    "keycloak-another-client": ("Keycloak, without a mapper", keycloak(azp="admin-cli")),
    "keycloak-id-token-of-the-client": ("Keycloak, without a mapper", keycloak(aud="web-spa", typ="ID")),
    "entra-graph": ("Microsoft Entra ID", ENTRA | {"aud": "00000003-0000-0000-c000-000000000000"}),
    "entra-v1": (
        "Microsoft Entra ID",
        ENTRA | {"iss": "https://sts.windows.net/TENANT_ID/", "aud": "api://API_CLIENT_ID", "ver": "1.0"},
    ),
    "entra-another-tenant": (
        "Microsoft Entra ID",
        ENTRA | {"iss": "https://login.microsoftonline.com/OTHER/v2.0", "tid": "OTHER"},
    ),
    "entra-without-user": ("Microsoft Entra ID", ENTRA | {"oid": None}),
}


def bearer(claims: dict[str, Any]) -> str:
    now = int(time.time())
    signed = {"iat": now, "exp": now + 60, **{name: value for name, value in claims.items() if value is not None}}
    return "Bearer " + jwt.encode(signed, KEY, "RS256", headers={"kid": "k1"})


def by_our_key(provider: str) -> dict[str, str]:
    """The printed settings, with our key in place of the provider's."""
    settings = {name: value for name, value in printed()[provider].items() if name != "BROKER_JWT_JWKS_URL"}
    return {"BROKER_AUTH": "jwt", "BROKER_JWT_PUBLIC_KEY": PEM, **settings}


def test_every_provider_of_the_table_has_a_token_here() -> None:
    assert list(printed()) == list(GOOD)
    assert {provider for provider, _ in BAD.values()} == set(GOOD)


@pytest.mark.parametrize("provider", GOOD)
def test_the_printed_settings_are_complete(provider: str) -> None:
    settings = load_settings(NEEDED | printed()[provider], env_file=None)

    assert settings.jwt_jwks_url
    assert settings.jwt_issuer


@pytest.mark.parametrize("provider", GOOD)
async def test_a_users_token_is_taken(provider: str, open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(by_our_key(provider), BROKER_SHARE_USER_ID="true")

    response = await post_session(broker, authorization=bearer(GOOD[provider]))

    assert response.status_code == 201, response.text
    user = GOOD[provider]["oid" if provider == "Microsoft Entra ID" else "sub"]
    assert upstream.asked["metadata"]["broker_user_id"] == user


@pytest.mark.parametrize(("provider", "claims"), BAD.values(), ids=BAD.keys())
async def test_a_token_for_another_app_is_refused(
    provider: str, claims: dict[str, Any], open_broker: OpenBroker
) -> None:
    broker = await open_broker(by_our_key(provider))

    response = await post_session(broker, authorization=bearer(claims))

    assert_problem(response, "unauthenticated")
