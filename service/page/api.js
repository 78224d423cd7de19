// The service as the page sees it. key.js gives every fetch its key, and asks the reader for one where it is needed.

import { plainFetch, storedKey } from "./key.js";

const TRIES = 5;
const FIRST_PAUSE_MS = 300;
const FULL_PAUSE_MS = 15000;
const END = 1000; // no event of a job has a higher number

/** An answer that is an error; its message is one sentence for the reader. */
export class Refusal extends Error {
  constructor(status, error) {
    super(error?.message ?? `The service answered ${status}.`);
    this.status = status;
    this.code = error?.code;
    this.param = error?.param;
  }
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function answered(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refusal(response.status, body?.error);
}

async function ask(path, init) {
  let response;
  try {
    response = await fetch(path, init);
  } catch {
    throw new Error("The service cannot be reached.");
  }
  return answered(response);
}

/** What is fetched without having been asked for never makes the page ask for a key. */
export async function quietly(path) {
  return answered(await (storedKey() ? fetch(path) : plainFetch(path)));
}

/** What can be chosen, from OpenAI's list with this service's fields: [{model, version, latest, steps, shows, scorers,
 *  bestOf, video}]; video is null, or {frames, fps, lengths}. */
export async function choices() {
  const { data } = await (await quietly("v1/models")).json();
  return data.flatMap((entry) => (entry.versions ?? [entry]).map((one) => ({
    model: entry.id,
    version: one.version,
    latest: one.latest ?? true,
    steps: [...(one.steps ?? [])].sort((a, b) => a - b),
    shows: one.shows_steps,
    scorers: one.scorers ?? [],
    bestOf: one.best_of ?? [],
    video: one.num_frames ? { frames: one.num_frames, fps: one.fps, lengths: one.lengths } : null,
  })));
}

const word = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** Accept a job; returns it. A second try of the same call finds the first one's job. */
export async function submit(body) {
  const headers = { "Content-Type": "application/json", Prefer: "respond-async", "Idempotency-Key": word() };
  const call = () => ask("generate", { method: "POST", headers, body: JSON.stringify(body) });
  try {
    return await (await call()).json();
  } catch (error) {
    if (error instanceof Refusal) throw error;
    await pause(FIRST_PAUSE_MS);
    return (await call()).json();
  }
}

export const cancel = async (id) => (await ask(`jobs/${id}/cancel`, { method: "POST" })).json();

/** The events of a stream's text, whole ones only: [{name, number, data}] and what is left of it. */
export function parse(text) {
  const blocks = text.split("\n\n");
  const rest = blocks.pop();
  const events = blocks.map((block) => {
    const lines = block.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trim()]);
    const field = (name) => lines.filter(([key]) => key === name).map(([, value]) => value).join("\n");
    return { name: field("event"), number: field("id"), data: field("data") };
  });
  return { events: events.filter((event) => event.data).map((event) => ({ ...event, data: JSON.parse(event.data) })), rest };
}

/** Call `onEvent` with each event of a job, each once, up to its end; a connection that breaks is made again. */
export async function follow(id, onEvent) {
  let last = null;
  let tried = 0;
  while (last === null || last < END) {
    try {
      const headers = last === null ? {} : { "Last-Event-ID": String(last) };
      const response = await ask(`jobs/${id}/events`, { headers });
      await read(response, (event) => {
        tried = 0;
        if (event.number) last = Number(event.number);
        onEvent(event);
      });
      if (last < END) throw new Error("The connection was lost while the image was being generated.");
    } catch (error) {
      if (error instanceof Refusal && error.status !== 503) throw error;
      if (++tried >= TRIES) throw error;
      await pause(Math.min(FIRST_PAUSE_MS * 2 ** tried, FULL_PAUSE_MS));
    }
  }
}

async function read(response, onEvent) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const { events, rest } = parse((text + value).replaceAll("\r\n", "\n"));
    text = rest;
    events.forEach(onEvent);
  }
}
