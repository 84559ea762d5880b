"""/client.js and its kin: served to pages of any origin, and cached."""

from pathlib import Path

import httpx
import pytest

from app.api.client import FOLDER, NAMES
from app.config.settings import SettingsError
from tests.conftest import Logs, OpenBroker
from tests.support.shapes import REQUEST_ID

MEDIA_TYPES = {".js": "text/javascript; charset=utf-8", ".ts": "text/plain; charset=utf-8"}
STRANGER = {"Origin": "https://stranger.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "script"}


def assert_public(response: httpx.Response) -> None:
    """Any page may load it, and keep it for an hour."""
    headers = response.headers
    assert headers.get_list("access-control-allow-origin") == ["*"]
    assert headers["cross-origin-resource-policy"] == "cross-origin"
    assert headers.get_list("cache-control") == ["public, max-age=3600"]
    assert headers["x-content-type-options"] == "nosniff"
    assert REQUEST_ID.fullmatch(headers["x-request-id"])


@pytest.mark.parametrize("origin", [{}, STRANGER, {"Origin": "null"}], ids=["no-origin", "a-stranger", "null"])
@pytest.mark.parametrize("name", NAMES)
async def test_a_file_is_served_to_every_origin(broker: httpx.AsyncClient, name: str, origin: dict[str, str]) -> None:
    response = await broker.get(f"/{name}", headers=origin)

    assert response.status_code == 200
    assert response.content == (FOLDER / name).read_bytes()
    assert response.headers["content-type"] == MEDIA_TYPES[Path(name).suffix]
    assert_public(response)


@pytest.mark.parametrize("given", ["{}", "W/{}", '"other", {}', "*"], ids=["same", "weak", "of-two", "any"])
async def test_an_unchanged_file_is_not_sent_again(broker: httpx.AsyncClient, given: str) -> None:
    etag = (await broker.get("/client.js")).headers["etag"]

    response = await broker.get("/client.js", headers={"If-None-Match": given.replace("{}", etag)})

    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == etag
    assert_public(response)


async def test_another_version_is_sent(broker: httpx.AsyncClient) -> None:
    response = await broker.get("/client.js", headers={"If-None-Match": '"another"'})

    assert response.status_code == 200


async def test_head_and_options(broker: httpx.AsyncClient) -> None:
    get, head = await broker.get("/client.js"), await broker.head("/client.js")
    options = await broker.options("/client.js")

    assert head.status_code == 200
    assert {**head.headers, "x-request-id": ""} == {**get.headers, "x-request-id": ""}
    assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS")


async def test_nothing_can_be_sent_there(broker: httpx.AsyncClient) -> None:
    response = await broker.post("/client.js")

    assert response.status_code == 405
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["allow"] == "GET, HEAD, OPTIONS"
    assert response.headers.get_list("cache-control") == ["no-store"]


@pytest.mark.parametrize("path", ["/client.ts", "/client.js/", "/build.mjs", "/package.json", "/src/client.js"])
async def test_nothing_else_of_the_folder_is_served(broker: httpx.AsyncClient, path: str) -> None:
    assert (await broker.get(path)).status_code == 404


async def test_the_prefix_of_a_proxy(open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_ROOT_PATH="/voice")

    assert (await broker.get("/voice/client.js")).status_code == 200
    assert (await broker.get("/client.js")).status_code == 200


@pytest.mark.parametrize("path", ["/client.js", "/livekit-client.js"])
async def test_a_broker_may_serve_none(open_broker: OpenBroker, path: str) -> None:
    broker = await open_broker(BROKER_CLIENT="false", BROKER_LIVEKIT_CLIENT=__file__)

    assert (await broker.get(path)).status_code == 404


async def test_livekit_client_is_the_operators_file(open_broker: OpenBroker, tmp_path: Path) -> None:
    file = tmp_path / "livekit-client.umd.js"
    file.write_text("// LiveKit’s own build", encoding="utf-8")
    broker = await open_broker(BROKER_LIVEKIT_CLIENT=str(file))

    response = await broker.get("/livekit-client.js", headers=STRANGER)

    assert response.text == "// LiveKit’s own build"
    assert response.headers["content-type"] == MEDIA_TYPES[".js"]
    assert_public(response)


async def test_without_one_there_is_no_livekit_client(broker: httpx.AsyncClient) -> None:
    assert (await broker.get("/livekit-client.js")).status_code == 404


@pytest.mark.parametrize("given", ["absent.js", "."], ids=["not-there", "a-folder"])
async def test_a_file_that_cannot_be_read_is_a_wrong_setting(
    open_broker: OpenBroker, tmp_path: Path, given: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        await open_broker(BROKER_LIVEKIT_CLIENT=str(tmp_path / given))

    [line] = refused.value.lines
    assert line.startswith("BROKER_LIVEKIT_CLIENT: cannot be read")


async def test_it_is_not_logged_at_info(broker: httpx.AsyncClient, logs: Logs) -> None:
    await broker.get("/client.js")

    [line] = [line for line in logs if line.get("route") == "/client.js"]
    assert line["log_level"] == "debug"
