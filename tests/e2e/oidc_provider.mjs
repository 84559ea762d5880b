// A real identity provider on a free loopback port, until it is told to end: prints its address as a line of JSON.
// One client, which gets access tokens for one resource server by its own credentials, as signed JWTs (RFC 9068).
import { generateKeyPairSync } from "node:crypto";
import { createServer } from "node:http";
import Provider from "oidc-provider";

const [client_id, client_secret, resource] = process.argv.slice(2);

const server = createServer().listen(0, "127.0.0.1", () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  const { privateKey } = generateKeyPairSync("rsa", { modulusLength: 2048 });
  const provider = new Provider(issuer, {
    clients: [
      { client_id, client_secret, grant_types: ["client_credentials"], redirect_uris: [], response_types: [] },
    ],
    cookies: { keys: ["for tests"] },
    jwks: { keys: [{ ...privateKey.export({ format: "jwk" }), kid: "first", alg: "RS256", use: "sig" }] },
    features: {
      clientCredentials: { enabled: true },
      devInteractions: { enabled: false },
      resourceIndicators: {
        enabled: true,
        defaultResource: () => resource,
        getResourceServerInfo: (_, indicator) => ({
          scope: "",
          audience: indicator,
          accessTokenFormat: "jwt",
          accessTokenTTL: 600,
          jwt: { sign: { alg: "RS256", kid: "first" } },
        }),
      },
    },
  });
  server.on("request", provider.callback());
  console.log(JSON.stringify({ issuer, jwks: `${issuer}/jwks`, token: `${issuer}/token` }));
});
