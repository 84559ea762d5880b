"""The browser's side as an npm package: built, packed, checked by TypeScript, bundled by Vite into pages that run."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.e2e.conftest import OpenPage, control, running_broker, running_site
from tests.support.needs import NODE_MODULES, node, program
from tests.support.processes import ROOT

pytestmark = pytest.mark.browser

CLIENT = ROOT / "app/client"
NAME = "oneinbox-broker-client"
BUILT = [f"{name}.{suffix}" for name in ("client", "element", "react") for suffix in ("js", "d.ts")]
VITE = (
    "vite",
    "@vitejs/plugin-react",
    "@vitejs/plugin-vue",
    "@sveltejs/vite-plugin-svelte",
    "react-dom",
    "svelte",
    "vue",
)
PRINTED_BROKER = "http://127.0.0.1:8000"
PATIENCE = 120
"""Seconds; ample on a busy machine."""
SETTINGS = {
    "BROKER_ALLOWED_ORIGINS": "http://127.0.0.1:*",
    "BROKER_LIVEKIT_CLIENT": str(ROOT / "app/sandbox/livekit-client.js"),
}

expect.set_options(timeout=20_000)


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that has to end well; return what it printed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, packed by npm."""
    folder = tmp_path_factory.mktemp("packed")
    run(program("npm", "npm"), "pack", "--pack-destination", folder, cwd=CLIENT)
    [packed] = folder.iterdir()
    return packed


def make_project(folder: Path, tarball: Path, without: str = "") -> Path:
    """Make a project with the package installed from its tarball, beside the tests' packages but `without`."""
    beside = folder / "node_modules"
    beside.mkdir(parents=True)
    for path in NODE_MODULES.iterdir():
        if path.name != without:
            (beside / path.name).symlink_to(path)
    project = folder / "project"
    project.mkdir()
    (project / "package.json").write_text('{"private": true, "type": "module"}')
    quiet = ("--offline", "--no-save", "--no-audit", "--no-fund", "--no-package-lock")
    run(program("npm", "npm"), "install", *quiet, tarball, cwd=project)
    return project


def test_the_committed_files_are_a_fresh_build(tmp_path: Path) -> None:
    node("esbuild", "typescript", "@types/react")
    source, built = tmp_path / "client", tmp_path / "built"
    ignored = shutil.ignore_patterns("node_modules", "*.js", "*.d.ts")
    shutil.copytree(CLIENT, source, ignore=ignored)
    shutil.copytree(CLIENT / "src", source / "src", dirs_exist_ok=True)
    (source / "node_modules").symlink_to(NODE_MODULES)
    built.mkdir()

    run(node(), "build.mjs", built, cwd=source)

    assert sorted(path.name for path in built.iterdir()) == sorted(BUILT)
    differing = [name for name in BUILT if (built / name).read_bytes() != (CLIENT / name).read_bytes()]
    assert differing == [], "run `npm install && npm run build` in app/client, and commit"


def test_the_package_holds_what_is_served_and_no_more(tarball: Path) -> None:
    names = {name.removeprefix("package/") for name in run("tar", "-tzf", tarball, cwd=tarball.parent).split()}

    assert names == {*BUILT, "package.json", "README.md", "LICENSE"}


def test_types(tarball: Path, tmp_path: Path) -> None:
    node("typescript", "@types/react", "livekit-client")
    project = make_project(tmp_path, tarball)
    shutil.copy(Path(__file__).with_name("client_types.tsx"), project)
    options = "--strict --noEmit --jsx react-jsx --target es2022 --module esnext --moduleResolution bundler"

    run(
        node(), NODE_MODULES / "typescript/bin/tsc", *options.split(), "--skipLibCheck", "client_types.tsx", cwd=project
    )


PAGES = {
    "plain": 'import "./talk.js";',
    "react": """
        import { StrictMode, createElement, useState } from "react";
        import { createRoot } from "react-dom/client";
        import { Talk } from "./Talk.jsx";
        function Page() {
          const [shown, show] = useState(true);
          const toggle = createElement("button", { onClick: () => show(!shown) }, "Toggle");
          return createElement(StrictMode, null, shown && createElement(Talk), toggle);
        }
        createRoot(document.querySelector("main")).render(createElement(Page));
    """,
    "vue": """
        import { createApp } from "vue";
        import Talk from "./Talk.vue";
        createApp(Talk).mount("main");
    """,
    "svelte": """
        import { mount } from "svelte";
        import Talk from "./Talk.svelte";
        mount(Talk, { target: document.querySelector("main") });
    """,
}
HTML = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Talk</title><link rel="icon" href="data:,">
<main><button id="talk">Talk</button><p id="status"></p></main><script type="module" src="./{}.js"></script>"""
CONFIG = """
import react from "@vitejs/plugin-react";
import vue from "@vitejs/plugin-vue";
import { svelte } from "@sveltejs/vite-plugin-svelte";
const isCustomElement = (tag) => tag === "oneinbox-call";
export default {
  plugins: [react(), vue({ template: { compilerOptions: { isCustomElement } } }), svelte()],
  build: { rollupOptions: { input: %s } },
};
"""


def build(project: Path, broker: str) -> str:
    """Bundle the examples; return what Vite said."""
    for path in (CLIENT / "examples").iterdir():
        text = path.read_text(encoding="utf-8").replace(PRINTED_BROKER, broker)
        (project / path.name).write_text(text, encoding="utf-8")
    for name, text in PAGES.items():
        page = HTML if name == "plain" else re.sub("<button.*</p>", "", HTML)
        (project / f"{name}-page.html").write_text(page.format(f"{name}-page"), encoding="utf-8")
        (project / f"{name}-page.js").write_text(text, encoding="utf-8")
    (project / "vite.config.js").write_text(CONFIG % [f"{name}-page.html" for name in PAGES], encoding="utf-8")
    return run(node(*VITE), NODE_MODULES / "vite/bin/vite.js", "build", cwd=project)


def test_a_bundle_takes_the_projects_own_livekit_client(tarball: Path, tmp_path: Path) -> None:
    node("livekit-client")
    project = make_project(tmp_path, tarball)

    build(project, PRINTED_BROKER)

    scripts = [path.read_text(encoding="utf-8") for path in (project / "dist/assets").glob("*.js")]
    assert any("publishTrack" in script and len(script) > 200_000 for script in scripts)


@dataclass(frozen=True)
class Site:
    """Pages bundled without livekit-client, so that the broker's is used."""

    url: str
    oneinbox: str
    said: str

    def starts(self) -> list[dict[str, object]]:
        """The bodies of the requests for a call that OneInbox got."""
        return [each["json"] for each in control(self.oneinbox, "requests") if each["path"] == "/v1/calls/web"]


@pytest.fixture(scope="module")
def site(tarball: Path, oneinbox: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    project = make_project(tmp_path_factory.mktemp("vite"), tarball, without="livekit-client")
    with running_broker(oneinbox, **SETTINGS) as (_, broker):
        said = build(project, broker)
        shutil.copy(project / "plain.html", project / "dist")
        with running_site(project / "dist") as url:
            yield Site(url, oneinbox, said)


def test_a_bundle_needs_no_livekit_client(site: Site) -> None:
    assert not re.search(r"(?i)\b(error|warn)", site.said)


@pytest.mark.parametrize("page", ["plain-page", "react-page", "vue-page", "svelte-page", "plain"])
def test_an_example_talks(site: Site, open_page: OpenPage, page: str) -> None:
    """The tag's own page has the element from the broker; the others have everything in their bundle."""
    before = len(site.starts())
    shown = open_page(f"{site.url}/{page}.html", complaints_expected="favicon", permissions=["microphone"])

    shown.get_by_role("button", name="Talk").click()
    hang_up = shown.get_by_role("button", name="Hang up")
    expect(hang_up).to_be_visible()
    assert len(site.starts()) == before + 1  # also under React's StrictMode
    if page != "plain":
        assert site.starts()[-1]["variables"] == {"customer_name": "Ada"}
    hang_up.click()

    expect(shown.get_by_role("button", name="Talk")).to_be_enabled()
    assert control(site.oneinbox, "calls")[0]["status"] == "completed"
    assert len(site.starts()) == before + 1


def test_a_react_component_that_goes_hangs_up(site: Site, open_page: OpenPage) -> None:
    shown = open_page(f"{site.url}/react-page.html", permissions=["microphone"])
    shown.get_by_role("button", name="Talk").click()
    expect(shown.get_by_role("button", name="Hang up")).to_be_visible()
    with shown.expect_response(re.compile("/stop$")):
        shown.get_by_role("button", name="Toggle").click()
    assert control(site.oneinbox, "calls")[0]["status"] == "completed"
