// From a picture's file to probabilities: the backbone once, and adapters as plain inputs of its graph.

import { Graphs } from "./computing.js";
import { load, tensorsOf, Told } from "./loading.js";

const MOST_PIXELS = 12.5e6; // what phones take; in float32 the graph holds several copies, and tabs have few gigabytes
const LONGEST_SIDE = 16384; // of canvases
const LONGEST_RATIO = 500; // as visgraft predict: making a longer picture square would take gigabytes
// Of the largest logit, between this runtime and the one that the export was proven with. In int8 a rounding that falls to
// the other side moves a whole step; 0.013 was found. Another adapter's answers differ by all of it.
const TOLERANCES = { fp32: 0.01, fp16: 0.01, int8: 0.1 };

/** RGB of a picture as it is seen upright, transparent places on the adapter's background. */
async function decode(blob, background) {
  let bitmap;
  try { // without colour management, as visgraft predict reads pictures
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Told("This is no picture that the browser can read, or it is damaged; choose a JPEG, PNG or WebP file.");
  }
  const from = [bitmap.width, bitmap.height];
  if (Math.max(...from) > LONGEST_RATIO * Math.min(...from)) {
    throw new Told(`The picture is ${from.join(" × ")} pixels, more than ${LONGEST_RATIO} times as long as wide; cut it into pieces.`);
  }
  const ratio = Math.min(1, Math.sqrt(MOST_PIXELS / (from[0] * from[1])), LONGEST_SIDE / Math.max(...from));
  const [width, height] = from.map((side) => Math.max(2, Math.floor(side * ratio)));
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  if (!context) throw new Told("The browser has no memory left for this picture; close other tabs, or choose a smaller one.");
  context.imageSmoothingQuality = "high";
  context.fillStyle = `rgb(${background.join(",")})`;
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height).data;
  canvas.width = canvas.height = 0; // gives its memory back at once
  const rgb = new Uint8Array(width * height * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4) {
    rgb[j++] = rgba[i];
    rgb[j++] = rgba[i + 1];
    rgb[j++] = rgba[i + 2];
  }
  return { rgb, width, height, from, reduced: ratio < 1 };
}

function probabilitiesOf(logits, several) {
  if (several) return logits.map((logit) => 1 / (1 + Math.exp(-logit)));
  const largest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((one, other) => one + other, 0);
  return powers.map((power) => power / sum);
}

/** What the outputs say of each task: its classes with their shares, or a number in its unit. */
function answersTo(tasks, logits) {
  let first = 0;
  return tasks.map(({ name, kind, classes, unit, mean, std }) => {
    const own = logits.slice(first, first += classes.length || 1);
    if (kind === "number") return { name, kind, value: own[0] * std + mean, unit };
    return { name, kind, classes, probabilities: probabilitiesOf(own, kind === "several_classes") };
  });
}

/** The folder's model; adapters are loaded when they are first asked for. */
export class Model {
  constructor(about, graphs) {
    this.about = about;
    this.graphs = graphs;
    this.tensors = new Map();
    this.last = Promise.resolve();
  }

  /** Load everything but adapters; `onProgress(bytes, of)`, the latter 0 when all are here; `device` as in Graphs. */
  static async open(onProgress, device) {
    if (typeof WebAssembly !== "object") {
      throw new Told("This browser has no WebAssembly, which the model needs; use a current Firefox, Chrome, Edge or Safari.");
    }
    const about = JSON.parse(new TextDecoder().decode(await load("adapters.json")));
    return new Model(about, await Graphs.open(about, device, onProgress));
  }

  async adapter(name) {
    if (!this.tensors.has(name)) this.tensors.set(name, tensorsOf(await load(this.about.adapters[name].file), this.graphs.ort));
    return this.tensors.get(name);
  }

  /** Compare with the export, and go to the CPU where the GPU answers otherwise; `told` says what is wrong, or null. */
  async check(name) {
    let { wrong, device } = await this.compare(name);
    if (wrong && device === "webgpu" && !this.graphs.forced) {
      await this.inTurn(() => this.graphs.toCpu(`the GPU answers otherwise than the export did: ${wrong}`));
      ({ wrong, device } = await this.compare(name));
    }
    const told = wrong && `on the picture that checks it, this browser answers otherwise than the export did: ${wrong}.`;
    return { device, told };
  }

  /** Compare the answer to one picture with what onnxruntime answered when the folder was written; wrong null: alike. */
  async compare(name) {
    const { check } = this.about.adapters[name];
    const { logits, device } = await this.answer(name, new Blob([await load("check.png")], { type: "image/png" }));
    const largest = Math.max(...check.map(Math.abs));
    const difference = Math.max(...check.map((value, i) => Math.abs(value - logits[i])));
    this.difference = difference / largest;
    const alike = difference <= TOLERANCES[this.about.backbone.precision] * largest + 1e-6;
    return { device, wrong: alike ? null : `a logit differs by ${(100 * this.difference).toPrecision(2)} % of the largest` };
  }

  /** Answer one picture after the other. */
  answer(name, blob) {
    return this.inTurn(() => this.run(name, blob));
  }

  inTurn(task) {
    const turn = this.last.then(task);
    this.last = turn.catch(() => {});
    return turn;
  }

  async run(name, blob) {
    const facts = this.about.adapters[name];
    const tensors = await this.adapter(name);
    const begin = performance.now();
    const { rgb, width, height, from, reduced } = await decode(blob, facts.background_rgb);
    const decoded = performance.now();
    const { logits, device } = await this.graphs.run(rgb, [height, width], tensors);
    const end = performance.now();
    const several = facts.task === "several_classes";
    const said = facts.tasks ? { tasks: answersTo(facts.tasks, logits) } : { several, probabilities: probabilitiesOf(logits, several) };
    return {
      adapter: name, device, logits, ...said, from,
      size: [width, height], reduced, milliseconds: { decode: decoded - begin, answer: end - decoded },
    };
  }
}
