// Start a call and hang up. The other recipes use this file.
const BROKER = "http://127.0.0.1:8000";

/**
 * Who is asking. With tokens: `headers` returns a fresh one each time. With cookies: `credentials` is "include".
 * @type {{ headers: () => Promise<Record<string, string>>, credentials: RequestCredentials }}
 */
export const login = { headers: async () => ({}), credentials: "same-origin" };

/** Start a call. `request`: fields that README.md lists. Throws an Error with `status`, `detail` and `retryAfter`. */
export async function startCall(request = {}, headers = {}) {
  const answer = await fetch(`${BROKER}/session`, {
    method: "POST",
    credentials: login.credentials,
    headers: { "Content-Type": "application/json", ...(await login.headers()), ...headers },
    body: JSON.stringify(request),
  });
  if (!answer.ok) throw await problemOf(answer);
  const { server_url, participant_token } = await answer.json();
  const call = new URL(answer.headers.get("Location"), answer.url).href; // to follow it, and to hang up
  return { server_url, participant_token, call };
}

export async function hangUp(call) {
  const who = { credentials: login.credentials, headers: await login.headers() };
  const answer = await fetch(`${call}/stop`, { method: "POST", ...who });
  if (!answer.ok) throw await problemOf(answer);
}

export async function problemOf(answer) {
  const problem = await answer.json().catch(() => ({})); // a proxy's own error page is not JSON
  const error = new Error(problem.title ?? `The broker answered ${answer.status}`);
  const retryAfter = Number(answer.headers.get("Retry-After")) || null; // seconds
  return Object.assign(error, { ...problem, status: answer.status, retryAfter });
}
