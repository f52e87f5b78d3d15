// The page of the server: what the user chooses, what is sent, and what comes back.

import { ask, inWords, keep, kept, Told } from "./asking.js";
import * as marking from "./marking.js";
import {
  aboutAdapter, answered, at, bestInWords, card, commandParts, counted, element, inSentence, kindOf, megabytes, number, showFacts,
  thumbnail,
} from "./showing.js";

const MOST_ADDRESS = 4000; // characters of adapters' names in one request
const FEW = 6; // answers to a picture that are shown open; of more, the first class each
const chosen = new Set();
let adapters = null; // by name
let rows = []; // of the list of adapters
let limits = null;
let pictures = [];
let pairs = 64; // answers asked for at once; fewer where the server takes fewer
let running = null; // what stops the requests under way
let due = 0;

const listed = () => rows.filter((one) => !one.item.hidden).map((one) => one.name);

const waiting = (seconds, tries, of) => say(`The server has too much to do; it will be asked again in ${seconds} s (${tries} of ${of}).`);
const state = (name) => { document.documentElement.dataset.state = name; };

function say(text) {
  if (at("status").textContent !== text) at("status").textContent = text;
}

function warn(text) {
  at("wrong").textContent = text;
  at("warning").hidden = text === "";
}

// Asking the server

function askToken(refused) {
  at("ask-token").hidden = false;
  document.querySelector("label[for=token]").textContent = refused
    ? "The server does not take this token; enter another" : "This server asks for a token";
  say("");
  at("token").focus();
}

function lacking(picture) {
  if (picture.error) return [];
  const open = (name) => !picture.answers.has(name) || marking.unmarked(picture.answers.get(name), adapters.get(name));
  return [...chosen].filter(open);
}

function words(names) {
  const about = names.map((name) => adapters.get(name));
  const found = new URLSearchParams(names.map((name) => ["adapter", name]));
  const several = about.filter((one) => one.multi_label || one.tasks).map((one) => one.outputs);
  found.set("top", Math.min(limits.top, Math.max(10, ...several))); // of several classes, all over the threshold
  marking.addMark(found, about);
  return found;
}

function sizeOf(picture) {
  return picture.file.size + 3 * picture.name.length + 1024; // with what a form writes around it
}

/** What to send next: pictures that lack the same adapters, as many as one request may hold. */
function nextJob() {
  const first = pictures.find((one) => lacking(one).length);
  if (!first) return null;
  const names = [];
  for (const name of lacking(first)) {
    const more = [...names, name];
    if (names.length && marking.asked(adapters.get(name)) !== marking.asked(adapters.get(names[0]))) continue;
    if (names.length && (more.length > pairs || String(words(more)).length > MOST_ADDRESS)) break;
    names.push(name);
  }
  const sent = [];
  let bytes = 0;
  for (const one of pictures) {
    const lacks = new Set(lacking(one));
    if (!names.every((name) => lacks.has(name))) continue;
    bytes += sizeOf(one);
    if (sent.length && (sent.length >= limits.images || (sent.length + 1) * names.length > pairs || bytes > limits.body_bytes)) break;
    sent.push(one);
  }
  return { names, sent };
}

async function send({ names, sent }) {
  const form = new FormData();
  for (const one of sent) form.append("image", one.file, one.name);
  const query = words(names);
  const told = await ask(`predict?${query}`, { method: "POST", body: form }, running.signal, waiting);
  if (told.answers.some((one) => one.digest && one.digest !== adapters.get(one.adapter)?.digest)) await loadAdapters();
  const entries = told.answers[Symbol.iterator]();
  for (const picture of sent) {
    for (const name of names) {
      const entry = entries.next().value;
      const marked = !query.has("unlike") || entry?.as_far !== undefined; // else it would be asked for without end
      if (!entry || !(entry.error || (entry.adapter === name && marked))) {
        throw new Told("The server answers something else than it was asked; load the page again.");
      }
      if (entry.error) {
        picture.error = entry.error;
        break;
      }
      picture.answers.set(name, entry);
      picture.cards.delete(name);
    }
    draw(picture);
  }
  return told.milliseconds ?? {};
}

/** Keep out what cannot be sent at all, and say so beside it. */
async function sendable(sent) {
  for (const one of sent) {
    if (sizeOf(one) > limits.body_bytes) {
      one.error = `This file of ${megabytes(one.file.size)} is larger than the ${megabytes(limits.body_bytes)} that the server takes; make it smaller.`;
    } else {
      await one.file.slice(0, 1).arrayBuffer().catch(() => {
        one.error = "The browser cannot read this file; it is a folder, or has changed since it was chosen. Choose it again.";
      });
    }
    if (one.error) draw(one);
  }
  return sent.filter((one) => !one.error);
}

async function run() {
  if (running || !adapters) return; // what was added meanwhile is seen
  running = new AbortController();
  const spent = {};
  const begin = performance.now();
  let done = 0;
  warn("");
  try {
    for (let job; (job = nextJob());) {
      const left = pictures.reduce((sum, one) => sum + lacking(one).length, 0);
      working(done, left);
      job.sent = await sendable(job.sent);
      if (!job.sent.length) continue;
      try {
        for (const [stage, value] of Object.entries(await send(job))) spent[stage] = (spent[stage] ?? 0) + value;
        done += job.sent.length * job.names.length;
      } catch (error) {
        const most = job.sent.length * job.names.length;
        if (error.status !== 413 || most === 1) throw error;
        pairs = Math.floor(most / 2);
      }
    }
    if (done) showFacts({ ...spent, all: performance.now() - begin });
    say(summary());
  } catch (error) {
    await failed(error);
  } finally {
    running = null;
    at("working").hidden = true;
    pictures.forEach(draw);
    const detail = { status: at("status").textContent, error: at("wrong").textContent };
    document.dispatchEvent(new CustomEvent("visgraft-answer", { detail }));
  }
}

async function failed(error) {
  if (error.status === 401) return askToken(error.refused);
  say("");
  warn(error.name === "AbortError" ? "Stopped." : inWords(error));
  if ([404, 422].includes(error.status)) await loadAdapters().catch(() => {}); // one was removed, or marks no more
}

function working(done, left) {
  at("working").hidden = false;
  at("progress").max = done + left;
  if (done) at("progress").value = done;
  else at("progress").removeAttribute("value");
  const open = pictures.filter((one) => lacking(one).length).length;
  say(`Answering: ${counted(open, "picture")} to go…`);
}

function soon(wait) {
  clearTimeout(due);
  due = setTimeout(run, wait);
}

// What is shown

function summary() {
  if (!pictures.length) return "Ready. Choose pictures.";
  if (!chosen.size) return "Choose an adapter that is to answer.";
  const wrong = pictures.filter((one) => one.error).length;
  const said = `${counted(pictures.length - wrong, "picture")} answered by ${counted(chosen.size, "adapter")}.`;
  const best = [...(pictures[0].answers.values())].filter((one) => chosen.has(one.adapter) && answered(one));
  if (pictures.length === 1 && !wrong && best.length && best.length <= 3) {
    return bestInWords(best, adapters, marking.wanted());
  }
  return wrong ? `${said} ${counted(wrong, "picture")} could not be answered.` : said;
}

function draw(picture) {
  const { answers, cards } = picture;
  const shown = [...(adapters?.keys() ?? [])].filter((name) => chosen.has(name) && answers.has(name));
  const few = chosen.size <= FEW;
  for (const name of shown) {
    if (cards.has(name)) continue;
    const [answer, about] = [answers.get(name), adapters.get(name)];
    cards.set(name, card(answer, about, few, Number(at("top").value), marking.markOf(answer, about)));
  }
  picture.place.replaceChildren(...shown.map((name) => cards.get(name)));
  picture.wrong.textContent = picture.error ?? "";
  picture.wrong.hidden = !picture.error;
}

function redraw() { // where the cards would be others
  pictures.forEach((one) => one.cards.clear());
  pictures.forEach(draw);
}

function add(files) {
  const added = [...files].map((file) => {
    const name = file.name || "pasted picture";
    const picture = { file, name, url: URL.createObjectURL(file), answers: new Map(), cards: new Map() };
    const item = picture.item = document.createElement("li");
    const head = element("div", "", "head");
    const title = head.appendChild(document.createElement("h3"));
    title.append(element("span", name, "name clamp"));
    title.title = name;
    const remove = head.appendChild(element("button", "Remove", "plain"));
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${inSentence(name)}`);
    remove.addEventListener("click", () => take(picture));
    picture.wrong = element("p", "", "wrong");
    picture.place = element("div", "", "answers");
    const told = element("div", "");
    told.append(head, picture.wrong);
    item.append(thumbnail(picture), told, picture.place);
    draw(picture);
    return picture;
  });
  pictures = [...added, ...pictures];
  at("pictures").prepend(...added.map((one) => one.item));
  changed();
  soon(0);
}

function take(picture) {
  const place = pictures.indexOf(picture);
  URL.revokeObjectURL(picture.url);
  picture.item.remove();
  pictures = pictures.filter((one) => one !== picture);
  (pictures[Math.min(place, pictures.length - 1)]?.item.querySelector("button") ?? at("file")).focus();
  at("facts").hidden ||= !pictures.length;
  changed();
  if (!running) say(summary());
}

// Adapters and the command

function row(about) {
  const item = document.createElement("li");
  const label = item.appendChild(document.createElement("label"));
  const box = document.createElement("input");
  box.type = "checkbox";
  box.checked = chosen.has(about.name);
  box.hidden = adapters.size === 1;
  box.addEventListener("change", () => choose([about.name], box.checked));
  const called = element("span", about.name, "name clamp");
  called.title = about.name;
  label.append(box, called);
  const more = item.appendChild(document.createElement("details"));
  more.append(element("summary", `${about.method}, ${kindOf(about)}`));
  const place = more.appendChild(element("div", "", "about"));
  more.addEventListener("toggle", () => place.childElementCount || aboutAdapter(about, place)); // thousands of classes, perhaps
  return { item, box, name: about.name, sought: [about.name, about.method, ...about.classes].join("\n").toLowerCase() };
}

async function loadAdapters() {
  const told = await ask("adapters", {}, running?.signal, waiting);
  const first = (one) => (chosen.has(one.name) ? 0 : 1);
  if (!adapters) remembered(told.adapters).forEach((name) => chosen.add(name));
  adapters = new Map(told.adapters.sort((one, other) => first(one) - first(other)).map((one) => [one.name, one]));
  limits = told.limits;
  pairs = Math.min(pairs, limits.answers);
  for (const name of chosen) if (!adapters.has(name)) chosen.delete(name);
  for (const picture of pictures) {
    for (const [name, { digest }] of picture.answers) if (adapters.get(name)?.digest !== digest) picture.answers.delete(name);
  }
  rows = told.adapters.map(row);
  at("adapters").replaceChildren(...rows.map((one) => one.item));
  at("adapters").classList.toggle("single", rows.length === 1);
  at("many").hidden = rows.length < 4;
  marking.offer(told.adapters);
  at("about").textContent = `Pictures are sent to ${location.host}, which answers them with adapters on ${told.backbone ?? "no backbone yet"}.`;
  search();
  redraw();
}

function remembered(all) {
  const names = all.map((one) => one.name);
  let found = [];
  try { found = JSON.parse(kept("chosen") || "[]").filter((name) => names.includes(name)); } catch { /* not ours */ }
  return found.length || names.length > 3 ? found : names;
}

function choose(names, on) {
  const few = chosen.size <= FEW;
  for (const name of names) on ? chosen.add(name) : chosen.delete(name);
  for (const one of rows) one.box.checked = chosen.has(one.name);
  keep("chosen", JSON.stringify([...chosen]));
  if (few !== chosen.size <= FEW) redraw();
  else pictures.forEach(draw);
  if (!running) say(summary());
  changed();
  soon(300);
}

function search() {
  const sought = at("search").value.trim().toLowerCase();
  for (const one of rows) one.item.hidden = !one.sought.includes(sought);
  changed();
}

function changed() {
  const some = at("search").value.trim() ? `, ${number.format(listed().length)} listed` : "";
  at("count").textContent = rows.length > 1 ? `${chosen.size} of ${counted(rows.length, "adapter")} chosen${some}` : "";
  at("clear").hidden = pictures.length < 2;
  if (adapters) at("command").replaceChildren(...command().flatMap((part, i) => [i ? " " : "", element("span", part)]));
}

function command() {
  const asked = new URLSearchParams([...chosen].map((name) => ["adapter", name]));
  asked.set("top", at("top").value);
  marking.addMark(asked, [...chosen].map((name) => adapters.get(name)));
  const names = pictures.slice(0, limits.images).map((one) => one.name);
  return commandParts(new URL(`predict?${asked}`, document.baseURI).href, names, kept("token") !== "");
}

async function copy() {
  const text = at("command").textContent;
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // only given to pages over https, and to this machine's own
    getSelection().selectAllChildren(at("command"));
    done = document.execCommand("copy");
  }
  at("copied").textContent = done ? "Copied." : "The browser does not allow it; it is selected, copy it by Ctrl+C.";
}

// Listening

function listen() {
  for (const id of ["file", "camera"]) {
    at(id).addEventListener("change", () => {
      add(at(id).files);
      at(id).value = ""; // so that the same file can be chosen again
    });
  }
  at("search").addEventListener("input", search);
  const clicks = {
    all: () => choose(listed(), true), none: () => choose([...chosen], false), clear: () => [...pictures].forEach(take),
    stop: () => running?.abort(), again: () => (adapters ? run() : begin()), copy,
  };
  for (const [id, act] of Object.entries(clicks)) at(id).addEventListener("click", act);
  at("top").addEventListener("change", () => {
    keep("top", at("top").value);
    redraw();
    changed();
  });
  marking.listen(() => {
    redraw();
    changed();
    soon(0);
  });
  at("ask-token").addEventListener("submit", (event) => {
    event.preventDefault();
    const token = at("token").value.trim();
    at("token").value = "";
    if (!/^[\x21-\x7e]+$/.test(token)) return askToken(true); // no header can hold it
    keep("token", token);
    at("ask-token").hidden = true;
    at("file").focus();
    adapters ? run() : begin();
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) at("drop").classList.remove("over");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
    if (event.dataTransfer.files.length) add(event.dataTransfer.files);
    else warn("What was dropped is no file; save the picture first, and drop its file.");
  });
  addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) add(event.clipboardData.files);
  });
}

async function begin() {
  state("loading");
  say("Loading…");
  warn("");
  try {
    await loadAdapters();
    at("file").disabled = at("camera").disabled = false;
    say(summary());
    state("ready");
    soon(0);
  } catch (error) {
    await failed(error);
    state("failed");
  }
}

at("top").value = [...at("top").options].some((one) => one.value === kept("top")) ? kept("top") : "5";
listen();
begin();
