// Talking to the server.

import { settings } from "./store.js";

export class ServerError extends Error {}

const SILENT = "The server does not answer: is it still running?";
const LOST = "The connection to the server was lost: check the network and whether the server still runs, then try again.";

// Failures on the way, as a sentence: browsers only say "network error" or "Failed to fetch".
async function orSay(sentence, promise) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(sentence);
  }
}

async function request(path, { headers = {}, ...options } = {}) {
  const [strange] = settings.api_key.match(/[^\x20-\x7e]/u) ?? [];  // fetch fails with it as if no server answered
  if (strange) throw new ServerError(`Settings: the API key has the character “${strange}”. Keys have only ASCII letters, digits and signs.`);
  if (settings.api_key) headers.Authorization = `Bearer ${settings.api_key}`;
  const response = await orSay(SILENT, fetch(path, { headers, ...options }));
  if (!response.ok) {
    const content = await response.json().catch(() => null);
    throw new ServerError(content?.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

const post = (path, body, signal) => request(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

// The events of an answer: {token, part, index}, {tokens}, {dropped_turns}, {done}. Throws if the stream ends without the last.
export async function* stream(messages, inside, signal) {
  const body = { messages };
  for (const name of ["temperature", "top_k", "top_p", "max_tokens", "seed"]) {
    if (settings[name] !== "") body[name] = Number(settings[name]);
  }
  if (inside) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  const response = await post("chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "", ended = false;
  for (;;) {
    const { done, value } = await orSay(LOST, reader.read());
    if (done && !ended) throw new ServerError("The connection ended before the answer did.");
    if (done) return;
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const content = JSON.parse(event.slice(6));
      if (content.error) throw new ServerError(content.error.message);
      ended ||= Boolean(content.done);
      yield content;
    }
  }
}

export const tokenize = async (body) => orSay(LOST, (await post("tokenize", body)).json());
export const get = async (path) => orSay(LOST, (await request(path)).json());
