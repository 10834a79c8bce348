// Talking to the server.

import { settings } from "./store.js";

export class ServerError extends Error {}

async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (settings.api_key) headers.Authorization = `Bearer ${settings.api_key}`;
  let response;
  try {
    response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer: is it still running?");
  }
  if (!response.ok) {
    const content = await response.json().catch(() => null);
    throw new ServerError(content?.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

// The events of an answer: {token, part}, {tokens}, {dropped_turns}, {done}. Throws if the stream ends without the last.
export async function* stream(messages, inside, signal) {
  const body = { messages };
  for (const name of ["temperature", "top_k", "top_p", "max_tokens", "seed"]) {
    if (settings[name] !== "") body[name] = Number(settings[name]);
  }
  if (inside) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  const response = await post("/chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "", ended = false;
  for (;;) {
    const { done, value } = await reader.read();
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

export const tokenize = async (body) => (await post("/tokenize", body)).json();

export async function get(path) {
  const headers = settings.api_key ? { Authorization: `Bearer ${settings.api_key}` } : {};
  const response = await fetch(path, { headers });
  if (!response.ok) throw new ServerError((await response.json().catch(() => null))?.error?.message ?? `The server answered ${response.status}.`);
  return response.json();
}
