// Requests to the server, and what is kept of the user's choices.

const TRIES = 3; // to come again where the server has too much to do
const LONGEST_WAIT = 300; // seconds
const PLACES = { token: "sessionStorage", chosen: "localStorage", top: "localStorage", unlike: "localStorage" };
const memory = {}; // where the browser keeps nothing

export class Told extends Error {
  name = "Told";
}

export function kept(key) {
  try { return window[PLACES[key]].getItem(`visgraft.${key}`) ?? memory[key] ?? ""; } catch { return memory[key] ?? ""; }
}

export function keep(key, value) {
  memory[key] = value;
  try { window[PLACES[key]].setItem(`visgraft.${key}`, value); } catch { /* kept as long as the page is open */ }
}

/** The JSON that the server answers; `onWait(seconds, tries, of)` before it is asked again. Raises Told, with the status. */
export async function ask(path, options, signal, onWait) {
  for (let tries = 1; ; tries++) {
    const token = kept("token");
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    let answer;
    try {
      answer = await fetch(path, { ...options, headers, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Told("The server does not answer; check that visgraft serve is running and the connection is there, and try again.");
    }
    if (answer.status === 429 && tries <= TRIES) {
      const seconds = secondsOf(answer.headers.get("Retry-After"));
      onWait(seconds, tries, TRIES);
      await pause(seconds, signal);
      continue;
    }
    const told = await answer.json().catch(() => null);
    if (answer.status === 401) throw Object.assign(new Told(""), { status: 401, refused: token !== "" });
    if (told && (answer.ok || told.answers)) return told;
    const reason = told?.error ?? `it answers ${answer.status} ${answer.statusText}`.trim();
    throw Object.assign(new Told(`The server cannot answer: ${reason}`), { status: answer.status });
  }
}

function secondsOf(told) {
  const seconds = /^\d+$/.test(told ?? "") ? Number(told) : Math.ceil((Date.parse(told) - Date.now()) / 1000);
  return Math.min(Math.max(seconds || 1, 1), LONGEST_WAIT);
}

function pause(seconds, signal) {
  return new Promise((done, stop) => {
    const timer = setTimeout(done, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      stop(signal.reason);
    }, { once: true });
  });
}

export function inWords(error) {
  if (error.name === "Told") return error.message;
  return `Something went wrong: ${error?.message ?? error}. Load the page again, or try another browser.`;
}
