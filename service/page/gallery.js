// What was drawn: one article for each request, or for a comparison of several on the same seeds.

import { Refusal, cancel, follow, submit } from "./api.js";
import { $, copy, display, element, milliseconds, rewardRows, say, signed } from "./dom.js";
import { candidateRows, choice, floorFacts } from "./quality.js";
import { showCode } from "./snippets.js";
import { remember, rescore } from "./viewer.js";

const PREVIEWS = 3;
let useSeed = () => {};

export function startGallery(use) {
  useSeed = use;
}

function facts(job) {
  const { queue_s, inference_s, score_s, total_s } = job.timings;
  return [
    `${milliseconds(total_s)} in all`,
    `waited ${milliseconds(queue_s)}`,
    `generated in ${milliseconds(inference_s)}`,
    `scored in ${milliseconds(score_s)}`,
    `batch of ${job.batch_size}`,
    ...floorFacts(job),
  ].join(" · ");
}

function preview(figure, event) {
  display(figure, `data:image/${event.output_format};base64,${event.b64_json}`, false, "");
  figure.classList.add("unfinished");
}

function complete(figure, event, part) {
  const { prompt } = part.body;
  const isVideo = event.output_format === "mp4";
  const source = `data:${isVideo ? "video" : "image"}/${event.output_format};base64,${event.b64_json}`;
  display(figure, source, isVideo, `${prompt} (seed ${event.seed})`);
  figure.classList.remove("unfinished", "waiting");
  figure.querySelector(".rewards").append(...rewardRows(event.reward));
  figure.querySelector(".rewards").after(...choice(event));
  const seed = figure.querySelector(".seed");
  seed.textContent = `seed ${event.seed}`;
  seed.addEventListener("click", () => useSeed(event.seed));
  const details = () => ({
    steps: event.steps ?? part.body.num_inference_steps ?? "the model's most",
    size: `${event.width} × ${event.height}`,
    ...(event.num_frames ? length(event) : {}),
    model: part.job ? `${part.job.model} ${part.job.model_version}` : "",
    ...candidateRows(event),
    "in all": part.job?.timings ? milliseconds(part.job.timings.total_s) : "",
    "generated in": part.job?.timings ? milliseconds(part.job.timings.inference_s) : "",
    "batch of": part.job?.batch_size ?? "",
  });
  remember(figure, { source, isVideo, name: `${event.seed}.${event.output_format}`, prompt, seed: event.seed, reward: event.reward, details });
}

/** How long a video is, and where its frames are worst. */
function length({ num_frames, fps, worst_frame, reward_worst }) {
  const worst = Object.entries(worst_frame ?? {}).map(([name, at]) => [`worst frame, ${name}`, `${at} (${signed(reward_worst[name])})`]);
  return { length: `${num_frames} frames · ${(num_frames / fps).toFixed(2)} s`, ...Object.fromEntries(worst) };
}

/** Scores that came later than their picture. */
function score(figure, reward) {
  figure.querySelector(".rewards").replaceChildren(...rewardRows(reward));
  rescore(figure, reward);
}

/** A request and where its pictures go. `body` is what is posted, `seen` tells how its waiting goes. */
function part(body, count, seen) {
  const figures = Array.from({ length: count }, () => copy("picture"));
  figures.forEach((figure) => figure.classList.add("waiting"));
  return { body, figures, seen, job: null, id: null };
}

function showEvent(one, event) {
  const { name, data } = event;
  if (name === "queued" && data.position !== null) {
    one.seen(data.position ? `waits behind ${data.position}` : "next in line");
  }
  if (name === "started") one.seen("generating …");
  if (name === "progress") one.seen(`generating … step ${data.step} of ${data.steps}`);
  if (name === "image_generation.partial_image") preview(one.figures[data.index], data);
  if (name === "image_generation.completed") complete(one.figures[data.index], data, one);
  if (name === "done") one.job = data.job;
  if (name === "scored") for (const image of data.data) score(one.figures[image.index], image.reward);
  if (name === "error") throw new Refusal(0, data.error);
}

/** Post a request and show its progress; with previews where there are any. */
async function run(one, previews) {
  let job;
  try {
    job = await submit(previews ? { ...one.body, partial_images: PREVIEWS } : one.body);
  } catch (error) {
    if (error.param !== "partial_images") throw error;
    job = await submit(one.body);
  }
  one.id = job.id;
  if (one.dropped) await cancel(one.id);
  await follow(job.id, (event) => showEvent(one, event));
  one.seen(facts(one.job));
}

/** The request that gives the same pictures again. */
const asDrawn = ({ body, job }) => (job ? { ...body, seed: job.seeds[0] } : body);

function article(title, parts) {
  const made = copy("run");
  made.classList.add("waiting");
  made.querySelector("h2").textContent = title;
  made.querySelector(".code").addEventListener("click", () => showCode(parts.map(asDrawn)));
  made.querySelector(".cancel").addEventListener("click", () => {
    for (const one of parts) {
      one.dropped = true;
      if (one.id) cancel(one.id).catch(() => {});
    }
  });
  return made;
}

async function finish(made, parts, previews) {
  $("gallery").prepend(made);
  try {
    await Promise.all(parts.map((one) => run(one, previews)));
    made.classList.remove("waiting");
    const what = parts[0].body.output_format === "mp4" ? "videos" : "pictures";
    say(`Done: ${parts.reduce((sum, one) => sum + one.figures.length, 0)} ${what} of ${parts[0].body.prompt}.`);
  } catch (error) {
    made.remove();
    parts.filter((one) => one.id && !one.job).forEach((one) => cancel(one.id).catch(() => {}));
    throw error;
  }
}

/** Draw one request; `previews` says whether previews of unfinished images are wanted. */
export async function draw(body, count, previews) {
  const one = part(body, count, (text) => { made.querySelector(".facts").textContent = text; });
  const made = article(body.prompt, [one]);
  one.seen("on its way …");
  made.querySelector(".pictures").append(...one.figures);
  await finish(made, [one], previews);
}

/** Draw the same seeds with each variant ({label, body, previews}), as the columns of a table. */
export async function compare(variants, count) {
  const heads = variants.map(({ label }) => {
    const head = element("div", "variant");
    head.append(element("h3", "", label), element("p", "facts", "on its way …"));
    return head;
  });
  const parts = variants.map(({ body }, k) => part(body, count, (text) => {
    heads[k].querySelector(".facts").textContent = text.split(" · ").filter((_, i) => i === 0 || i === 2).join(" · ");
  }));
  const made = article(variants[0].body.prompt, parts);
  made.classList.add("comparison");
  made.querySelector(".facts").textContent = `${variants.length} ways, the same seeds`;
  const table = made.querySelector(".pictures");
  table.style.setProperty("--columns", String(variants.length));
  heads.forEach((head, k) => {
    const column = element("section", "column");
    column.append(head, ...parts[k].figures);
    table.append(column);
  });
  await finish(made, parts, variants.every(({ previews }) => previews));
}
