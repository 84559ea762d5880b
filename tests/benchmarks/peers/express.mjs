// The broker as a tutorial shows it: Express, and Node's own fetch.
import express from "express";

const app = express();

app.post("/session", async (request, response) => {
  const answer = await fetch(`${process.env.UPSTREAM}/v1/calls/web`, {
    method: "POST",
    headers: { Authorization: "Bearer oi_sk_benchmark", "Content-Type": "application/json" },
    body: JSON.stringify({ agent_id: "agt_benchmark" }),
  });
  const { server_url, participant_token } = await answer.json();
  response.status(201).json({ server_url, participant_token });
});

app.listen(process.env.PORT, "127.0.0.1");
