// A call from start to end with openapi-fetch, typed by the broker's OpenAPI document. Prints what it got, as JSON.
//     openapi-typescript deploy/openapi.json -o broker.d.ts
import createClient from "openapi-fetch";
import type { components, paths } from "./broker.js";

const broker = createClient<paths>({ baseUrl: process.argv[2]! });

const started = await broker.POST("/session", {
  params: { header: { "Idempotency-Key": crypto.randomUUID() } },
  body: { variables: { customer_name: "Ada", order_count: 3, premium: true } },
});
if (started.error) {
  throw new Error(`${started.error.title}: ${started.error.detail}`);
}
const session: components["schemas"]["Session"] = started.data;
const call = started.response.headers.get("Location")!.split("/").at(-1)!;

const read = await broker.GET("/calls/{call}", { params: { path: { call } } });
const etag = read.response.headers.get("ETag")!;
const again = await broker.GET("/calls/{call}", { params: { path: { call }, header: { "If-None-Match": etag } } });

const stopped = await broker.POST("/calls/{call}/stop", { params: { path: { call } } });
const endReason: string | null | undefined = stopped.data?.end_reason;

// @ts-expect-error: the compiler knows what the fields take
const refused = await broker.POST("/session", { body: { agent: 7 } });
const problem: components["schemas"]["Problem"] | undefined = refused.error;

// @ts-expect-error: and the routes
const nowhere = await broker.GET("/call/{call}", { params: { path: { call } } });

console.log(
  JSON.stringify({
    session,
    read: read.data,
    again: again.response.status,
    stopped: stopped.data?.status,
    endReason,
    problem,
    nowhere: nowhere.response.status,
  }),
);
