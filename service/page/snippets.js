// The same request from a program, to be copied.

import { $, element, say } from "./dom.js";
import { storedKey } from "./key.js";

const base = () => new URL(".", location.href).href.replace(/\/$/, "");
const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl(body) {
  const key = storedKey() ? ' \\\n  -H "Authorization: Bearer $FEWSTEP_API_KEY"' : "";
  return `curl -s ${base()}/generate${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${shell(JSON.stringify(body))}`;
}

/** A JSON value as Python writes it. */
function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  return value === null ? "None" : JSON.stringify(value);
}

function python(body) {
  const { prompt, ...rest } = body;
  const named = Object.entries(rest).map(([name, value]) => `, ${name}=${literal(value)}`).join("");
  return [
    "import fewstep",
    "",
    `with fewstep.Client(${literal(base())}) as client:${storedKey() ? "  # the key: FEWSTEP_API_KEY" : ""}`,
    `    answer = client.generate(${literal(prompt)}${named})`,
    "    for picture in answer.data:",
    "        print(picture.seed, picture.reward)",
    `        picture.save(f"{picture.seed}.${body.output_format ?? "png"}")`,
  ].join("\n");
}

const LANGUAGES = { curl, Python: python };

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text); // only where the page came over TLS or from this machine
  } catch {
    const range = document.createRange();
    range.selectNodeContents($("snippet").querySelector("pre"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    if (!document.execCommand("copy")) return "Press Ctrl+C";
  }
  return "Copied";
}

/** Show the requests as code. */
export function showCode(bodies) {
  const box = $("snippet");
  const tabs = box.querySelector(".tabs");
  const pre = box.querySelector("pre");
  const show = (name) => {
    pre.textContent = bodies.map(LANGUAGES[name]).join("\n\n");
    for (const tab of tabs.children) tab.setAttribute("aria-pressed", String(tab.textContent === name));
    box.querySelector(".copy").textContent = "Copy";
  };
  tabs.replaceChildren(...Object.keys(LANGUAGES).map((name) => {
    const tab = element("button", "", name);
    tab.type = "button";
    tab.addEventListener("click", () => show(name));
    return tab;
  }));
  show("curl");
  box.showModal();
}

$("snippet").querySelector(".copy").addEventListener("click", async (event) => {
  const button = event.currentTarget;
  button.textContent = await toClipboard($("snippet").querySelector("pre").textContent);
  say(button.textContent);
});
$("snippet").querySelector(".close").addEventListener("click", () => $("snippet").close());
