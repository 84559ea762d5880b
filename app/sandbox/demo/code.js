// The code that does what this page does, with the page's inputs in it.

const broker = location.origin;

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`; // for a shell
const attribute = (text) => text.replaceAll("&", "&amp;").replaceAll("'", "&#39;");
const named = (name) => (/^[A-Za-z_]\w*$/.test(name) ? name : JSON.stringify(name));

const json = (value) =>
  value && typeof value === "object"
    ? `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${json(each)}`).join(", ")}}`
    : JSON.stringify(value);

const literal = (value) =>
  value && typeof value === "object"
    ? `{ ${Object.entries(value).map(([name, each]) => `${named(name)}: ${literal(each)}`).join(", ")} }`
    : JSON.stringify(value);

const tag = ({ agent, variables }) => {
  const attributes = [
    agent && ` agent="${attribute(agent).replaceAll('"', "&quot;")}"`,
    variables && `\n  variables='${attribute(json(variables))}'`,
  ];
  return `<script type="module"
  src="${broker}/client.js"></script>

<oneinbox-call${attributes.filter(Boolean).join("")}></oneinbox-call>`;
};

const js = (wanted) => {
  const lines = Object.entries(wanted).map(([name, value]) => `    ${name}: ${literal(value)},\n`);
  const options = lines.length ? `{\n${lines.join("")}  }` : "";
  return `import { Broker } from "${broker}/client.js";

const broker = new Broker();

talk.onclick = async () => {
  const call = await broker.talk(${options});
  call.on("end", () => console.log("It is over."));
  hangUp.onclick = () => call.hangUp();
};`;
};

const react = (wanted) => `import { Broker } from "oneinbox-broker-client";
import { useCall } from "oneinbox-broker-client/react";

const broker = new Broker({ url: "${broker}" });

export function Talk() {
  const { start, hangUp, state, error } = useCall(broker);
  if (state === "running") return <button onClick={hangUp}>Hang up</button>;
  const talk = () => start(${Object.keys(wanted).length ? literal(wanted) : ""});
  return <><button onClick={talk}>Talk</button> {error?.message}</>;
}`;

const curl = (wanted) => {
  const body = Object.keys(wanted).length ? json(wanted) : null;
  return asCurl({ method: "POST", path: "/session", headers: body ? [["Content-Type", "application/json"]] : [], body });
};

export const LANGUAGES = {
  tag: [tag, "One tag is the whole button, with states, microphone, errors and time left."],
  js: [js, "Your own buttons. Microphone first, then the call: a blocked microphone costs nothing."],
  react: [react, "StrictMode asks once. The package is app/client, under the name you give it."],
  curl: [curl, "Two fields come back, and a Location to follow the call and hang up."],
};

/** Returns an exchange's request as a command line. */
export function asCurl({ method, path, headers, body }) {
  const options = [...headers.map((header) => `-H ${quoted(header.join(": "))}`), body && `-d ${quoted(body)}`];
  return [`curl -i -X ${method} ${quoted(broker + path)}`, ...options.filter(Boolean)].join(" \\\n  ");
}
