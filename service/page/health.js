// What the metrics say of the quality of the images: golden probes, drift of the scores, canaries.

import { element } from "./dom.js";

const PROBE = {
  same: "generates identical images",
  recorded: "generates the images recorded at its first probe here",
  pixels_changed: "generates different images than before",
  scores_changed: "generates identical images, but their scores have changed",
  failed: "cannot generate its golden probe",
};
const CAUSE = {
  engine: "the engine", scorer: "a scorer", model: "the model", prompts: "the prompts", unknown: "unknown",
};
const STATE = { running: "is being compared", promoted: "was promoted", rolled_back: "was rolled back", stopped: "was stopped" };

const named = (read, name) => read.filter((one) => one.name === name);

function probes(read) {
  const found = named(read, "fewstep_probe_workers").filter(({ labels, value }) => value && PROBE[labels.outcome]);
  return found.map(({ labels: { model, version, outcome }, value }) => ({
    text: `${model} ${version} ${PROBE[outcome]} (${value} worker${value === 1 ? "" : "s"})`,
    bad: !["same", "recorded"].includes(outcome),
  }));
}

function drift(read) {
  const tested = named(read, "fewstep_drift_alarm").filter(({ labels }) => labels.selected === "false");
  const alarms = tested.filter(({ value }) => value);
  if (!alarms.length) return tested.length ? [{ text: "Scores have not drifted", bad: false }] : [];
  return alarms.map(({ labels: { model, version, steps, scorer, cause } }) => ({
    text: `${scorer} scores of ${model} ${version} at ${steps} steps have drifted: ${CAUSE[cause] ?? cause}`, bad: true,
  }));
}

function canaries(read) {
  const states = named(read, "fewstep_canary_state").filter(({ value }) => value);
  return states.map(({ labels: { model, base, candidate, state } }) => {
    const pairs = named(read, "fewstep_canary_pairs").find(({ labels }) => labels.model === model)?.value ?? 0;
    return {
      text: `${model} ${candidate} ${STATE[state] ?? state}, against ${base}: ${pairs} pairs`, bad: state === "rolled_back",
    };
  });
}

/** All findings, as [{text, bad}]. */
export const findings = (read) => [...probes(read), ...drift(read), ...canaries(read)];

/** The same as list items. */
export const items = (read) => findings(read).map(({ text, bad }) => element("li", bad ? "bad" : "", text));
