// A picture, large, with everything that is known of it; arrows leaf through the gallery.

import { $, display, element, rewardRows } from "./dom.js";

const shown = new WeakMap(); // the figure of a picture → what is known of it
let current = null;

/** Remember what is known of a figure's picture: {source, isVideo, name, prompt, seed, reward, details}. */
export function remember(figure, known) {
  shown.set(figure, known);
  figure.querySelector(".frame").addEventListener("click", () => show(figure));
}

/** Its scores have come later than the picture. */
export function rescore(figure, reward) {
  const known = shown.get(figure);
  if (known) known.reward = reward;
}

function show(figure) {
  const known = shown.get(figure);
  const box = $("viewer");
  current = figure;
  display(box.querySelector(".stage"), known.source, known.isVideo, `${known.prompt} (seed ${known.seed})`);
  box.querySelector("h2").textContent = known.prompt;
  box.querySelector(".rewards").replaceChildren(...rewardRows(known.reward));
  const rows = Object.entries({ seed: known.seed, ...known.details() });
  box.querySelector(".details").replaceChildren(
    ...rows.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", String(value))]),
  );
  const save = box.querySelector(".save");
  save.href = known.source;
  save.download = known.name;
  if (!box.open) box.showModal();
}

function leaf(by) {
  const all = [...document.querySelectorAll(".picture")].filter((figure) => shown.has(figure));
  const next = all[all.indexOf(current) + by];
  if (next) show(next);
}

/** `use` is called with the seed that the reader wants to use again. */
export function startViewer(use) {
  const box = $("viewer");
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") leaf(1);
    if (event.key === "ArrowLeft") leaf(-1);
  });
  box.addEventListener("click", (event) => { if (event.target === box) box.close(); });
  box.addEventListener("close", () => box.querySelector("video").pause());
  box.querySelector(".close").addEventListener("click", () => box.close());
  box.querySelector(".again").addEventListener("click", () => { box.close(); use(shown.get(current).seed); });
}
