// The service at work, read from /metrics: what happened in the last minute, or, if nothing did, since it started.

import { quietly } from "./api.js";
import { $, element, milliseconds } from "./dom.js";
import { items } from "./health.js";
import { storedKey } from "./key.js";

const EVERY_MS = 2000;
const WINDOW_MS = 60000;
const SPARKS = 30;
const SAMPLE = /^([a-z_]+)(?:\{(.*)\})? ([-+.\deInfNa]+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
let history = []; // [{at, read}], the oldest first
let timer = 0;
let refused; // the key that may not see this: asking again would only fill the console

/** Prometheus' text as [{name, labels, value}]. */
export function samples(text) {
  return text.split("\n").flatMap((line) => {
    const [, name, labels, value] = SAMPLE.exec(line) ?? [];
    if (!name) return [];
    return [{ name, labels: Object.fromEntries([...(labels ?? "").matchAll(LABEL)].map(([, key, of]) => [key, of])), value: Number(value) }];
  });
}

const total = (read, name) => read.filter((one) => one.name === name).reduce((sum, one) => sum + one.value, 0);

/** A histogram's buckets, summed over all labels but `le`: [{le, count}] with counts that do not add up. */
export function buckets(read, name, wanted = () => true) {
  const sums = new Map();
  for (const { name: found, labels, value } of read) {
    if (found !== `${name}_bucket` || !wanted(labels)) continue;
    const le = labels.le === "+Inf" ? Infinity : Number(labels.le);
    sums.set(le, (sums.get(le) ?? 0) + value);
  }
  const upTo = [...sums].sort(([a], [b]) => a - b);
  return upTo.map(([le, count], k) => ({ le, count: count - (k ? upTo[k - 1][1] : 0) }));
}

/** What happened between two updates; a restarted service starts from zero. */
export function since(now, before) {
  const gone = now.map(({ le, count }, k) => ({ le, count: count - (before[k]?.count ?? 0) }));
  return gone.some(({ count }) => count < 0) ? now : gone;
}

/** The value that a share of all is below, between its bucket's bounds; null of nothing. */
export function quantile(share, found) {
  const all = found.reduce((sum, { count }) => sum + count, 0);
  if (!all) return null;
  let below = 0;
  for (const [k, { le, count }] of found.entries()) {
    const lower = k ? found[k - 1].le : 0;
    if (count && below + count >= share * all) {
      return le === Infinity ? lower : lower + ((le - lower) * (share * all - below)) / count;
    }
    below += count;
  }
  return found.at(-1).le;
}

function svg(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  return made;
}

/** Bars over the true axis of a reward; their areas are the counts. */
function chart(found) {
  const bars = found.flatMap(({ le, count }, k) => {
    const lower = k ? found[k - 1].le : le - 1;
    const upper = le === Infinity ? lower + 1 : le;
    return [{ lower, upper, count, density: count / (upper - lower) }];
  });
  const used = bars.filter(({ count }) => count);
  const [low, high] = [Math.min(-1.5, used[0].lower - 0.5), Math.max(1.5, used.at(-1).upper + 0.5)];
  const most = Math.max(...bars.map(({ density }) => density));
  const x = (value) => ((value - low) / (high - low)) * 100;
  const made = svg("svg", { viewBox: "0 0 100 34", preserveAspectRatio: "none", role: "img" });
  for (const { lower, upper, count, density } of used) {
    const height = (density / most) * 32;
    const bar = svg("rect", { x: x(lower), y: 34 - height, width: x(upper) - x(lower) - 0.5, height, class: lower < 0 ? "below" : "above" });
    bar.append(svg("title", {}));
    bar.firstChild.textContent = `${lower} to ${upper}: ${count}`;
    made.append(bar);
  }
  made.append(svg("line", { x1: x(0), x2: x(0), y1: 0, y2: 34 }));
  const marks = [Math.ceil(low), 0, Math.floor(high)].map((at) => {
    const mark = element("span", "mark", String(at).replace("-", "−"));
    mark.style.left = `${x(at)}%`;
    return mark;
  });
  return [made, ...marks];
}

function showRewards(read) {
  const scorers = [...new Set(read.filter(({ name }) => name === "fewstep_reward_score_bucket").map(({ labels }) => labels.scorer))];
  $("histograms").replaceChildren(...scorers.sort().map((scorer) => {
    const found = buckets(read, "fewstep_reward_score", (labels) => labels.scorer === scorer);
    const all = found.reduce((sum, { count }) => sum + count, 0);
    const box = element("figure", "histogram");
    box.append(element("figcaption", "", `${scorer} reward · ${all.toLocaleString()} ${all === 1 ? "image" : "images"}`));
    const plot = element("div", "plot");
    plot.append(...(all ? chart(found) : []));
    box.append(plot);
    return box;
  }));
}

function showRates() {
  const images = history.map(({ at, read }) => ({ at, count: total(read, "fewstep_images_total") }));
  const rates = images.slice(1).map(({ at, count }, k) => Math.max(0, count - images[k].count) / ((at - images[k].at) / 1000));
  const [first, last] = [images[0], images.at(-1)];
  const rate = last.at > first.at ? Math.max(0, last.count - first.count) / ((last.at - first.at) / 1000) : null;
  $("rate").textContent = rate === null ? "–" : rate.toFixed(1);
  const recent = rates.slice(-SPARKS);
  const most = Math.max(1, ...recent);
  const points = recent.map((value, k) => `${((k + SPARKS - recent.length) / (SPARKS - 1)) * 100},${23 - (value / most) * 22}`);
  $("spark").querySelector("path").setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
}

function showLatency() {
  const [before, now] = [history[0].read, history.at(-1).read].map((read) => buckets(read, "fewstep_job_duration_seconds"));
  const lately = since(now, before);
  const found = lately.some(({ count }) => count) ? lately : now;
  for (const [id, share] of [["p50", 0.5], ["p99", 0.99]]) {
    const seconds = quantile(share, found);
    $(id).textContent = seconds === null ? "–" : milliseconds(seconds);
  }
  const what = found === now ? "since the service started" : "in the last minute";
  $("window").textContent = found.some(({ count }) => count) ? `From request to images, ${what}` : "No images yet";
}

function show(read) {
  history = [...history.filter(({ at }) => Date.now() - at <= WINDOW_MS), { at: Date.now(), read }];
  $("waiting").textContent = total(read, "fewstep_queue_depth");
  $("running").textContent = total(read, "fewstep_running_jobs");
  showRates();
  showLatency();
  showRewards(read);
  $("health").replaceChildren(...items(read));
}

function explain(text) {
  $("panel-note").textContent = text;
  $("panel-note").hidden = !text;
  $("figures").hidden = Boolean(text);
}

async function update() {
  clearTimeout(timer);
  if (!$("panel").open || document.hidden) return;
  if (refused !== storedKey()) await read();
  timer = setTimeout(update, EVERY_MS);
}

async function read() {
  try {
    show(samples(await (await quietly("metrics")).text()));
    explain("");
  } catch (error) {
    if (error.status === 401) explain("An API key is needed to see this: it is asked for when you generate.");
    else if (error.status === 403) explain("This API key may not see the metrics.");
    else explain("The metrics cannot be reached.");
    if (error.status === 401 || error.status === 403) refused = storedKey();
  }
}

/** Look every now and then for as long as somebody can see it. */
export function startPanel() {
  $("panel").open = matchMedia("(min-width: 68rem)").matches;
  $("panel").addEventListener("toggle", update);
  document.addEventListener("visibilitychange", update);
  update();
}
