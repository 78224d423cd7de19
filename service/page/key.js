// Where the service needs an API key, asks for it and keeps it for this tab. Every request of the page goes through
// fetch, so this is the one place that knows of keys.

const KEY_NAME = "fewstep.key";
export const plainFetch = window.fetch.bind(window);
let asking = null;

/** A link cannot carry a key: those that would need one are not shown. */
const markKeyed = () => document.documentElement.classList.add("keyed");

export const storedKey = () => sessionStorage.getItem(KEY_NAME);

function dialog(message) {
  const box = document.createElement("dialog");
  box.className = "key";
  box.innerHTML = `<form method="dialog"><p></p>
    <label>API key<input type="password" name="key" required autocomplete="off" spellcheck="false"></label>
    <p class="hint">It is kept in this tab only, until you close it.</p>
    <menu><button type="button" class="quiet">Cancel</button><button type="submit">Use this key</button></menu></form>`;
  box.querySelector("p").textContent = message;
  document.body.append(box);
  return box;
}

/** The key that the reader gives, or null. Several requests at once ask once. */
function askForKey(message) {
  asking ??= new Promise((resolve) => {
    const box = dialog(message);
    let key = null;
    box.querySelector(".quiet").addEventListener("click", () => box.close());
    box.querySelector("form").addEventListener("submit", () => { key = box.querySelector("input").value.trim(); });
    box.addEventListener("close", () => {
      if (key) sessionStorage.setItem(KEY_NAME, key);
      box.remove();
      asking = null;
      resolve(key || null);
    });
    markKeyed();
    box.showModal();
  });
  return asking;
}

function withKey(request, key) {
  const headers = new Headers(request.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  return plainFetch(new Request(request.clone(), { headers }));
}

if (storedKey()) markKeyed();

window.fetch = async (input, init) => {
  const request = new Request(input, init);
  if (new URL(request.url).origin !== location.origin) return plainFetch(request);
  let key = storedKey();
  let response = await withKey(request, key);
  while (response.status === 401) {
    const error = (await response.clone().json().catch(() => null))?.error;
    if (storedKey() === key) sessionStorage.removeItem(KEY_NAME); // another request may have asked meanwhile
    key = storedKey() ?? (await askForKey(error?.message ?? "An API key is needed."));
    if (key === null) return response;
    response = await withKey(request, key);
  }
  return response;
};
