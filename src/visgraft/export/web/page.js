// The page: what the user does and sees. A plain script, so that it can tell why it does not work as a file.
"use strict";

const TOP = 5;
const THRESHOLD = 0.5; // of images with several classes, as visgraft predict
const at = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");
let model = null;
let shown = null; // the picture on the page: its blob and name
let latest = 0;

function state(name) {
  document.documentElement.dataset.state = name;
}

function say(text) {
  at("status").textContent = text;
}

function warn(text) {
  at("warning").textContent = text;
  at("warning").hidden = text === "";
}

function inWords(error) {
  if (error.name === "Told") return error.message;
  const text = String(error?.message ?? error);
  if (error instanceof RangeError || /memory|bad_alloc|allocation/i.test(text)) {
    return "The browser's memory does not suffice; close other tabs, or choose a smaller picture, and load the page again.";
  }
  return `Something went wrong: ${text}. Load the page again, or try another browser.`;
}

function megabytes(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

function sides(size) {
  return size.map((side) => number.format(side)).join(" × ");
}

function percent(share) {
  if (share < 0.0005) return "< 0.1 %";
  return `${(100 * share).toFixed(1)} %`;
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function best(probabilities, names, several) {
  const named = probabilities.map((share, i) => ({ share, name: names[i] })).sort((one, other) => other.share - one.share);
  return several ? named.filter((one) => one.share >= THRESHOLD) : named.slice(0, TOP);
}

function bars(kept) {
  return kept.map(({ share, name }) => {
    const item = document.createElement("li");
    const bar = element("span", "", "bar");
    bar.setAttribute("aria-hidden", "true");
    const fill = bar.appendChild(element("i", ""));
    fill.style.width = `${100 * share}%`;
    item.append(element("span", name, "name"), element("span", percent(share), "share"), bar);
    return item;
  });
}

function rowsOf({ name, kind, value, unit, classes, probabilities }) {
  const title = element("li", name, "task");
  if (kind === "number") {
    const digits = { maximumSignificantDigits: Math.abs(value) < 1e4 ? 4 : 6 };
    return [title, element("li", `${new Intl.NumberFormat("en", digits).format(value)} ${unit}`.trim(), "number")];
  }
  const kept = best(probabilities, classes, kind === "several_classes");
  return [title, ...(kept.length ? bars(kept) : [element("li", `No class reaches ${percent(THRESHOLD)}.`)])];
}

function showAnswers(answer) {
  const { classes, outputs } = model.about.adapters[answer.adapter];
  const names = classes.length === outputs ? classes : Array.from({ length: outputs }, (_, i) => String(i));
  const rows = answer.tasks ? answer.tasks.flatMap(rowsOf) : bars(best(answer.probabilities, names, answer.several));
  at("answers").replaceChildren(...rows);
  say(rows.length ? "" : `No class reaches ${percent(THRESHOLD)}.`);
  const note = at("note");
  note.hidden = !answer.reduced;
  note.textContent = answer.reduced
    ? `The picture of ${sides(answer.from)} pixels was reduced to ${sides(answer.size)} before it was answered, to spare the browser's memory; an answer can differ a little from visgraft predict.`
    : "";
  showFacts(answer);
}

function showFacts(answer) {
  const { decode, answer: run } = answer.milliseconds;
  const facts = {
    "answered in": `${number.format(Math.round(run))} ms`,
    "picture read in": `${number.format(Math.round(decode))} ms`,
    "computed by": deviceInWords(answer.device),
    "model": `${megabytes(model.about.page.backbone_bytes)}, ${model.about.backbone.precision}`,
    "adapter": megabytes(model.about.adapters[answer.adapter].bytes),
  };
  at("facts").replaceChildren(...Object.entries(facts).map(([name, value]) => {
    const pair = document.createElement("div");
    pair.append(element("dt", name), element("dd", value));
    return pair;
  }));
  at("facts").hidden = false;
}

function deviceInWords(device) {
  if (device === "webgpu") return "WebGPU";
  const { threads } = model.graphs;
  return `the CPU, ${threads === 1 ? "one thread" : `${threads} threads`}`;
}

function showDevice() {
  const { device, note } = model.graphs;
  at("device").textContent = `Runs on ${device === "webgpu" ? "WebGPU" : "the CPU"}${note ? `, because ${note}` : ""}.`;
  at("device").hidden = false;
}

async function answer() {
  if (!shown || !model) return;
  const turn = ++latest;
  say("Answering…");
  await new Promise((done) => setTimeout(done, 30)); // so that the words and the picture are painted first
  try {
    const found = await model.answer(at("adapter").value, shown.blob);
    if (turn !== latest) return; // another picture or adapter was chosen meanwhile
    await checkAdapter(); // anew where the GPU failed meanwhile
    if (turn !== latest) return;
    showAnswers(found);
    at("caption").textContent = `${shown.name}, ${sides(found.from)} pixels`;
    document.dispatchEvent(new CustomEvent("visgraft-answer", { detail: { ...found, name: shown.name } }));
  } catch (error) {
    if (turn !== latest) return;
    at("answers").replaceChildren();
    at("facts").hidden = at("note").hidden = true;
    say(inWords(error));
    document.dispatchEvent(new CustomEvent("visgraft-answer", { detail: { error: inWords(error), name: shown.name } }));
  }
}

function show(blob, name) {
  if (shown) URL.revokeObjectURL(at("picture").src);
  shown = { blob, name };
  at("picture").src = URL.createObjectURL(blob);
  at("picture").alt = name;
  at("caption").textContent = name;
  at("shown").hidden = false;
  answer();
}

function take(files) {
  const file = [...(files ?? [])].find((one) => one.type.startsWith("image/")) ?? files?.[0];
  if (file && model) show(file, file.name || "pasted picture");
}

function listen() {
  for (const id of ["file", "camera"]) {
    at(id).addEventListener("change", () => {
      take(at(id).files);
      at(id).value = ""; // so that the same file can be chosen again
    });
    at(id).disabled = false;
  }
  at("adapter").disabled = false;
  at("adapter").addEventListener("change", async () => {
    latest++; // what is being computed is another adapter's
    await checkAdapter();
    answer();
  });
}

function listenToDrops() { // from the beginning: a browser would leave the page for a file that is dropped on it
  const drop = at("drop");
  addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) drop.classList.remove("over");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => take(event.clipboardData.files));
}

const checked = new Map();

async function checkAdapter() {
  const name = at("adapter").value;
  const known = () => checked.get(`${model.graphs.device} ${name}`);
  try {
    while (known() === undefined) { // again where the GPU gave way to the CPU meanwhile
      const { device, told } = await model.check(name);
      checked.set(`${device} ${name}`, told);
    }
    const told = known();
    showDevice();
    if (at("adapter").value === name) warn(told ? `Do not rely on these answers: ${told}` : "");
  } catch (error) {
    warn(inWords(error));
  }
}

async function begin() {
  state("loading");
  listenToDrops();
  if (location.protocol === "file:") {
    throw Object.assign(new Error("Browsers do not let a page read its model from files. Serve the folder, for example by “python -m http.server” inside it, and open http://localhost:8000."), { name: "Told" });
  }
  const { Model } = await import("./answering.js");
  model = await Model.open((loaded, of) => {
    at("progress").hidden = of === 0;
    at("progress").value = of ? loaded / of : 1;
    say(of ? `Loading the model: ${megabytes(loaded)} of ${megabytes(of)}` : "Starting the model…");
  }, new URLSearchParams(location.search).get("device"));
  at("adapter").replaceChildren(...Object.keys(model.about.adapters).map((name) => new Option(name, name)));
  at("adapter").hidden = at("adapter").options.length < 2;
  at("only").textContent = at("adapter").hidden ? at("adapter").value : "";
  await checkAdapter();
  listen();
  say("Ready. Choose a picture.");
  state("ready");
}

begin().catch((error) => {
  at("progress").hidden = true;
  say("The model cannot answer here.");
  warn(inWords(error));
  state("failed");
});
