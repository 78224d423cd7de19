// The form: what can be asked for, and what is done with it.

import { choices } from "./api.js";
import { $, element } from "./dom.js";
import { compare, draw, startGallery } from "./gallery.js";
import { quality, showQuality } from "./quality.js";
import { startPanel } from "./panel.js";
import { startViewer } from "./viewer.js";

const EXAMPLES = [
  "a red heart above a blue star",
  "a large yellow star on a navy background",
  "a small green ring left of a large orange square",
  "a purple diamond below a white circle on a mint background",
  "small black cross on gray",
];
const SEED_LIMIT = 2 ** 32;
const LOOK_AGAIN_MS = 5000;
const MOST_VARIANTS = 6;
let lookAgain = 0;
let listed = null; // the first question for what follows
let offered = []; // as choices() has it

/** What is served, and whether it is ready; asked again for as long as it is not. */
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

function option(value, text) {
  const made = element("option", "", text);
  made.value = value;
  return made;
}

const name = ({ model, version }) => `${model} ${version ?? ""}`.trim();
const stepped = (steps) => `${steps} step${steps === 1 ? "" : "s"}`;
const chosen = () => offered[Number($("model").value)] ?? null;

/** Models, versions and step counts, as far as the service tells them. */
async function showChoices() {
  try {
    offered = await choices();
  } catch {
    return; // the form works without
  }
  $("model").replaceChildren(...offered.map((one, k) => option(k, name(one))));
  $("model").value = String(Math.max(0, offered.findIndex(({ latest }) => latest)));
  $("model-field").hidden = offered.length < 2;
  showChosen();
}

/** What the chosen model draws, and the fields that it needs. */
function showChosen() {
  const video = chosen()?.video ?? null;
  $("question").textContent = video ? "Describe a video" : "Describe a picture";
  $("count-name").textContent = video ? "Videos" : "Images";
  if (video && $("frames").disabled) $("count").value = 1; // a video takes long, and its reader may want one
  for (const [name, value] of [["frames", video?.frames], ["fps", video?.fps]]) {
    $(`${name}-field`).hidden = $(name).disabled = !video;
    $(name).value = value ?? "";
  }
  const { shortest, longest, step, compiled } = video?.lengths ?? {};
  Object.assign($("frames"), { min: shortest ?? 1, max: longest ?? "", step: compiled ? 1 : step ?? 1 });
  $("frames").readOnly = Boolean(video) && shortest === longest;
  $("lengths").replaceChildren(...(compiled ?? []).map((count) => option(count, count)));
  checkFrames();
  showSteps();
}

/** A compiled student has some lengths and none between them. */
function checkFrames() {
  const { compiled } = chosen()?.video?.lengths ?? {};
  const absent = compiled && !compiled.includes(Number($("frames").value));
  $("frames").setCustomValidity(absent ? `This model generates ${compiled.join(", ")} frames` : "");
}

function showSteps() {
  const steps = chosen()?.steps ?? [];
  const kept = Number($("steps").value);
  $("steps").replaceChildren(...steps.map((count) => option(count, count)));
  $("steps").value = String(steps.includes(kept) ? kept : steps.at(-1));
  $("steps-field").hidden = steps.length < 2;
  showHints();
  const variants = offered.flatMap((one, k) => one.steps.map((count) => ({ k, count })));
  $("compare-field").hidden = variants.length < 2;
  $("variants").querySelector(".chips").replaceChildren(...variants.map(chip));
}

const chosenSteps = () => Number($("steps").value) || null;
const showHints = () => showQuality(chosen(), chosenSteps());

/** One way to draw, to be compared: all step counts of the chosen model are, to begin with. */
function chip({ k, count }) {
  const made = element("label", "chip");
  const box = element("input");
  box.type = "checkbox";
  box.value = `${k} ${count}`;
  box.checked = offered[k] === chosen();
  made.append(box, offered.length > 1 ? `${name(offered[k])} · ${stepped(count)}` : stepped(count));
  return made;
}

function body(one, steps) {
  const asked = { prompt: $("prompt").value.trim(), n: Number($("count").value) };
  if ($("seed").value !== "") asked.seed = Number($("seed").value) % SEED_LIMIT;
  if (steps) asked.num_inference_steps = steps;
  if (one?.video) {
    Object.assign(asked, { output_format: "mp4", num_frames: Number($("frames").value), fps: Number($("fps").value) });
  }
  if (one && offered.length > 1) Object.assign(asked, { model: one.model, model_version: one.version });
  return asked;
}

// A model that is not known yet may not show its steps, and to ask for them would be refused.
const hasPreviews = (one) => one?.shows ?? false;

function variants() {
  const boxes = [...$("variants").querySelectorAll("input:checked")];
  const seed = $("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : null;
  return boxes.map((box) => {
    const [k, steps] = box.value.split(" ").map(Number);
    const asked = { ...body(offered[k], steps), ...(seed === null ? {} : { seed }) };
    return { label: box.parentElement.textContent, body: asked, previews: hasPreviews(offered[k]) };
  });
}

async function start() {
  const count = Number($("count").value);
  if (!$("compare").checked) {
    const asked = { ...body(chosen(), chosenSteps()), ...quality(chosen(), chosenSteps()) };
    if (asked.cascade) delete asked.num_inference_steps;
    return draw(asked, count, hasPreviews(chosen()));
  }
  const asked = variants();
  if (asked.length < 2) throw new Error("Choose at least two ways to compare.");
  if (asked.length > MOST_VARIANTS) throw new Error(`Choose at most ${MOST_VARIANTS} ways to compare.`);
  return compare(asked, count);
}

async function submitted() {
  $("error").hidden = true;
  $("empty").hidden = true;
  $("draw").disabled = true;
  try {
    await listed;
    await start();
    if (!offered.length) showChoices(); // with the key that the reader has given meanwhile
  } catch (error) {
    $("error").textContent = error.message;
    $("error").hidden = false;
    showAbout();
  } finally {
    $("draw").disabled = false;
  }
}

function use(seed) {
  $("seed").value = seed;
  $("count").value = 1;
  $("seed").focus();
  $("form").scrollIntoView({ block: "nearest" });
}

for (const example of EXAMPLES) {
  const button = element("button", "", example);
  button.type = "button";
  button.addEventListener("click", () => { $("prompt").value = example; $("form").requestSubmit(); });
  $("examples").append(button);
}
$("form").addEventListener("submit", (event) => { event.preventDefault(); if (!$("draw").disabled) submitted(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.closest("input, textarea, select, dialog")) {
    event.preventDefault();
    $("prompt").select();
  }
});
$("model").addEventListener("change", showChosen);
$("frames").addEventListener("input", checkFrames);
for (const id of ["steps", "best-of", "floor", "more-steps"]) $(id).addEventListener("change", showHints);
$("compare").addEventListener("change", () => {
  $("variants").hidden = !$("compare").checked;
  $("steps").disabled = $("compare").checked;
  for (const input of $("quality").querySelectorAll("select")) input.disabled = $("compare").checked;
});

startGallery(use);
startViewer(use);
startPanel();
showAbout();
listed = showChoices();
