// Asks a broker for tokens as a web page does: with LiveKit's own client and nothing else.
//   node livekit_client.mjs http://127.0.0.1:8000/session
// Prints one JSON object: what each fetch resolved to, and the message of the one that must fail.
// livekit-client is made for browsers; the part that fetches tokens runs in Node as it is.
import { TokenSource } from 'livekit-client';

const source = TokenSource.endpoint(process.argv[2]);

const named = await source.fetch({
  agentName: 'default',
  agentMetadata: 'from the page',
  participantName: 'Ada',
  participantMetadata: 'about Ada',
  participantAttributes: { plan: 'gold' },
});
const plain = await source.fetch({});
const again = await source.fetch({});
const forced = await source.fetch({}, true);
const refused = await source.fetch({ roomName: 'my-room' }).then(
  () => null,
  (error) => error.message,
);

console.log(JSON.stringify({ named, plain, again, forced, refused }));
