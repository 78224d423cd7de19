// What all parts of the page use: elements and figures.

export const $ = (id) => document.getElementById(id);
export const copy = (id) => $(id).content.firstElementChild.cloneNode(true);

export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export function milliseconds(seconds) {
  if (seconds >= 1) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  return `${Math.max(1, Math.round(seconds * 1000))} ms`;
}

const still = matchMedia("(prefers-reduced-motion: reduce)");

/** Show a file in a box that has an img and a video: a video plays, unless the reader wants nothing to move. */
export function display(box, source, isVideo, alt) {
  const [img, video] = [box.querySelector("img"), box.querySelector("video")];
  img.hidden = isVideo;
  video.hidden = !isVideo;
  if (isVideo) {
    video.src = source;
    video.ariaLabel = alt;
    video.autoplay = !still.matches;
  } else {
    video.removeAttribute("src");
    img.src = source;
    img.alt = alt;
  }
}

export const signed = (score) => (score < 0 ? "−" : "+") + Math.abs(score).toFixed(2);

const FULL_BAR = 3; // a reward of this size fills its half of the bar

function reward(name, score) {
  const bar = element("div", score < 0 ? "bar below" : "bar");
  const fill = element("i");
  const share = Math.min(Math.abs(score) / FULL_BAR, 1) * 50;
  fill.style.width = `${share}%`;
  fill.style.left = `${score < 0 ? 50 - share : 50}%`;
  bar.append(fill);
  return [element("dt", "", name), bar, element("dd", "", signed(score))];
}

/** The rows of a list of rewards: name, bar, figure. */
export const rewardRows = (rewards) => Object.entries(rewards).flatMap(([name, score]) => reward(name, score));

/** Tells those who do not see the page what has happened. */
export function say(text) {
  $("said").textContent = text;
}
