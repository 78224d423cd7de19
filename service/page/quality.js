// Choosing among candidates: what can be asked for, what it is likely to buy, and how a picture was chosen.

import { $, element, signed } from "./dom.js";

const field = (id) => $(id).value;

/** The fields of a request that say so; nothing where nothing is chosen. `steps` are the model's step counts. */
export function quality(one, steps) {
  if ($("quality").hidden) return {};
  const asked = {};
  if (Number(field("best-of")) > 1) asked.best_of = Number(field("best-of"));
  if (!field("floor")) return asked;
  const cascade = $("more-steps").checked ? cascadeFrom(one, steps) : [];
  if (cascade.length > 1) asked.cascade = cascade;
  if (asked.cascade || asked.best_of) asked.min_reward = field("floor");
  return asked;
}

/** The chosen step count and all larger ones. */
const cascadeFrom = (one, steps) => (one?.steps ?? []).filter((count) => count >= (steps ?? 0));

/** What is likely: the gain by scorer above a single picture, and the cost. */
function prediction(one, steps) {
  const count = Number(field("best-of"));
  const known = one?.bestOf.find((row) => row.steps === steps && row.best_of === count);
  if (count < 2) return "";
  if (field("floor")) return "";
  const cost = `${count} times the cost`;
  if (!known) return `${cost}; what it gains was not measured for this model`;
  const gains = Object.entries(known.gain).sort(([name]) => (name === known.rank_by ? -1 : 1));
  const expected = gains.map(([name, gain]) => `${signed(gain)} ${name}${name === known.rank_by ? " (chooses)" : ""}`);
  return `Expected: ${expected.join(", ")}; ${cost}`;
}

function floorHint(one, steps) {
  if (!field("floor")) return "";
  const cascade = $("more-steps").checked ? cascadeFrom(one, steps) : [];
  if (cascade.length < 2 && Number(field("best-of")) < 2) return "A floor needs more candidates, or fewer steps to begin with";
  const ways = [];
  if (Number(field("best-of")) > 1) ways.push("with other seeds");
  if (cascade.length > 1) ways.push(`then at ${cascade.slice(1).join(" and ")} steps`);
  const most = Number(field("best-of")) * (cascade.length > 1 ? cascade.reduce((sum, count) => sum + count, 0) / cascade[0] : 1);
  return `Images below the floor are generated again ${ways.join(", ")}; one costs ${most} times as much at most`;
}

/** Bring the hints up to date with the form. */
export function showQuality(one, steps) {
  $("quality").hidden = !one?.scorers?.length;
  $("quality-hint").textContent = [prediction(one, steps), floorHint(one, steps)].filter(Boolean).join(". ");
  const larger = cascadeFrom(one, steps).length > 1;
  $("more-steps").disabled = !larger || !field("floor");
}

const drawn = ({ candidates }) => (candidates.length > 1 ? `best of ${candidates.length}` : "generated once");

/** Under a picture that was chosen: how, and its candidates in the order of their scores. */
export function choice(event) {
  if (!event.candidates) return [];
  const made = element("div", "choice");
  const words = [drawn(event), `${event.steps} step${event.steps === 1 ? "" : "s"}`];
  made.append(element("span", "", words.join(" · ")));
  if (event.below_floor) made.append(element("span", "below-floor", "below the floor"));
  return [made];
}

/** The candidates of a picture as rows of a table. */
export function candidateRows(event) {
  if (!event.candidates) return {};
  const scorer = Object.keys(event.reward).find((name) => !(name in (event.reported ?? {})));
  const scores = [...event.candidates].sort((a, b) => a.rank - b.rank)
    .map((one) => `${scorer in one.reward ? signed(one.reward[scorer]) : "–"} (${one.steps})`);
  const reported = Object.entries(event.reported ?? {}).map(([name, score]) => `${name} ${signed(score)}`).join(", ");
  return {
    chosen: drawn(event) + (event.candidates.length > 1 ? ` by ${scorer}` : ""),
    candidates: scores.join(", "),
    "did not choose": reported || "–",
    ...(event.below_floor === undefined || event.below_floor === null ? {} : { floor: event.below_floor ? "below" : "reached" }),
  };
}

/** What a job says of the floor. */
export function floorFacts(job) {
  const facts = [];
  if (job.floor) {
    const { min_reward: asked, score, percentile, lowered } = job.floor;
    const rank = percentile === null ? "" : ` (p${Math.round(percentile)})`;
    facts.push(lowered ? `floor ${asked}, lowered to ${signed(score)}${rank} under load` : `floor ${signed(score)}${rank}`);
  }
  if (job.ended_by) facts.push(`${job.ended_by}: the best so far`);
  return facts;
}
