"use strict";

const EXAMPLES = [
  "a red heart above a blue star",
  "a large yellow star on a navy background",
  "a small green ring left of a large orange square",
  "a purple diamond below a white circle on a mint background",
  "small black cross on gray",
];
const SEED_LIMIT = 2 ** 32;
const FULL_BAR = 3; // a reward of this size fills its half of the bar
const LOOK_AGAIN_MS = 5000;
let lookAgain = 0;

const $ = (id) => document.getElementById(id);
const copy = (id) => $(id).content.firstElementChild.cloneNode(true);

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** What is served, and whether it is ready; looks again for as long as it is not. */
async function showAbout() {
  clearTimeout(lookAgain);
  let about = { ready: false, text: "the service cannot be reached" };
  try {
    const response = await fetch("readyz");
    const body = await response.json();
    about = response.ok
      ? { ready: true, text: `${body.model} ${body.model_version} · ${body.runtime}` }
      : { ready: false, text: body.error.message };
  } catch { /* the text above says it */ }
  $("about").textContent = about.text;
  $("about").className = `about ${about.ready ? "ready" : "away"}`;
  if (!about.ready) lookAgain = setTimeout(showAbout, LOOK_AGAIN_MS);
}

/** The answer to a request; throws an Error whose message is one sentence for the reader. */
async function generate(request) {
  let response;
  try {
    response = await fetch("generate", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request),
    });
  } catch {
    throw new Error("The service cannot be reached.");
  }
  const body = await response.json().catch(() => null);
  if (!response.ok) throw new Error(body?.error?.message ?? `The service answered ${response.status}.`);
  return body;
}

function reward(name, score) {
  const bar = element("div", score < 0 ? "bar below" : "bar");
  const fill = element("i");
  const share = Math.min(Math.abs(score) / FULL_BAR, 1) * 50;
  fill.style.width = `${share}%`;
  fill.style.left = `${score < 0 ? 50 - share : 50}%`;
  bar.append(fill);
  const sign = score < 0 ? "−" : "+";
  return [element("dt", "", name), bar, element("dd", "", sign + Math.abs(score).toFixed(2))];
}

function picture(image, prompt) {
  const figure = copy("picture");
  const source = `data:image/png;base64,${image.b64_json}`;
  const link = figure.querySelector("a");
  link.href = source;
  link.download = `${image.seed}.png`;
  link.title = "Save this picture";
  const img = figure.querySelector("img");
  img.src = source;
  img.alt = `${prompt} (seed ${image.seed})`;
  for (const [name, score] of Object.entries(image.reward)) {
    figure.querySelector(".rewards").append(...reward(name, score));
  }
  const seed = figure.querySelector(".seed");
  seed.textContent = `seed ${image.seed}`;
  seed.addEventListener("click", () => { $("seed").value = image.seed; $("count").value = 1; $("seed").focus(); });
  return figure;
}

const milliseconds = (seconds) => `${Math.max(1, Math.round(seconds * 1000))} ms`;

function facts(answer) {
  const { queue_s, inference_s, score_s, total_s } = answer.timings;
  return [
    `${milliseconds(total_s)} in all`,
    `waited ${milliseconds(queue_s)}`,
    `drawn in ${milliseconds(inference_s)}`,
    `scored in ${milliseconds(score_s)}`,
    `batch of ${answer.batch_size}`,
  ].join(" · ");
}

/** An article that waits for its pictures. */
function newRun(prompt, count) {
  const run = copy("run");
  run.classList.add("waiting");
  run.querySelector("h2").textContent = prompt;
  run.querySelector(".facts").textContent = "drawing …";
  for (let k = 0; k < count; k++) run.querySelector(".pictures").append(copy("picture"));
  return run;
}

async function draw() {
  const prompt = $("prompt").value.trim();
  const count = Number($("count").value);
  const request = { prompt, num_images_per_prompt: count };
  if ($("seed").value !== "") request.seed = Number($("seed").value) % SEED_LIMIT;
  const run = newRun(prompt, count);
  $("error").hidden = true;
  $("empty").hidden = true;
  $("draw").disabled = true;
  $("gallery").prepend(run);
  try {
    const answer = await generate(request);
    run.querySelector(".facts").textContent = facts(answer);
    run.querySelector(".pictures").replaceChildren(...answer.data.map((image) => picture(image, prompt)));
    run.classList.remove("waiting");
  } catch (error) {
    run.remove();
    $("error").textContent = error.message;
    $("error").hidden = false;
    showAbout();
  } finally {
    $("draw").disabled = false;
  }
}

for (const example of EXAMPLES) {
  const button = element("button", "", example);
  button.type = "button";
  button.addEventListener("click", () => { $("prompt").value = example; $("form").requestSubmit(); });
  $("examples").append(button);
}
$("form").addEventListener("submit", (event) => { event.preventDefault(); if (!$("draw").disabled) draw(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
showAbout();
