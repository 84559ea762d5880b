// What Node does at its best: Fastify, and a pool of undici.
import Fastify from "fastify";
import { Pool } from "undici";

const app = Fastify();
const oneinbox = new Pool(process.env.UPSTREAM, { connections: 128 });

app.post("/session", async (request, reply) => {
  const { body } = await oneinbox.request({
    path: "/v1/calls/web",
    method: "POST",
    headers: { authorization: "Bearer oi_sk_benchmark", "content-type": "application/json" },
    body: JSON.stringify({ agent_id: "agt_benchmark" }),
  });
  const { server_url, participant_token } = await body.json();
  reply.code(201);
  return { server_url, participant_token };
});

await app.listen({ port: Number(process.env.PORT), host: "127.0.0.1" });
