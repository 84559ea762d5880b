// Makes of src/ what is served and packed: smaller, and with types. node build.mjs [FOLDER]; this folder by default.
import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { transformSync } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const folder = process.argv[2] ?? here;
const { version } = JSON.parse(readFileSync(join(here, "package.json"), "utf8"));
const tsc = join(dirname(createRequire(import.meta.url).resolve("typescript/package.json")), "bin/tsc");

/** Declarations that JSDoc cannot express: the element's name in the page and in JSX. */
const GLOBALS = {
  client: "",
  element: `
declare global {
    interface HTMLElementTagNameMap {
        "oneinbox-call": OneInboxCallElement;
    }
}
`,
  react: `
import type { DetailedHTMLProps, HTMLAttributes } from "react";
import type { OneInboxCallElement } from "./element.js";
type Attribute = "agent" | "livekit" | "variables" | "metadata" | "strings" | "label";
declare module "react" {
    namespace JSX {
        interface IntrinsicElements {
            "oneinbox-call": DetailedHTMLProps<HTMLAttributes<OneInboxCallElement>, OneInboxCallElement> &
                Partial<Record<Attribute, string>> & { broker?: string | Broker; transcript?: boolean };
        }
    }
}
`,
};

execFileSync(process.execPath, [tsc, "--project", here, "--outDir", folder], { stdio: "inherit" });
for (const [name, declarations] of Object.entries(GLOBALS)) {
  const source = readFileSync(join(here, "src", `${name}.js`), "utf8");
  const { code } = transformSync(source, { minify: true, format: "esm", target: "es2022", charset: "utf8" });
  // Minifying loses the comments that keep bundlers from imports they cannot resolve.
  const marked = code.replace(/\bimport\((?!")/g, "import(/* @vite-ignore */ /* webpackIgnore: true */ ");
  writeFileSync(join(folder, `${name}.js`), `/*! OneInbox token broker ${version}, MIT */\n${marked}`);
  const types = join(folder, `${name}.d.ts`);
  writeFileSync(types, readFileSync(types, "utf8") + declarations);
}
