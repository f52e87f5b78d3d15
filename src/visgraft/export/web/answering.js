// From a picture's file to probabilities: the runtime, the backbone once, and adapters as plain inputs of its graph.

const MOST_PIXELS = 12.5e6; // what phones take; in float32 the graph holds several copies, and tabs have few gigabytes
const LONGEST_SIDE = 16384; // of canvases
const LONGEST_RATIO = 500; // as visgraft predict: making a longer picture square would take gigabytes
const MOST_THREADS = 4;
// Of the largest logit, between this runtime and the one that the export was proven with. In int8 a rounding that falls to
// the other side moves a whole step; 0.013 was found. Another adapter's answers differ by all of it.
const TOLERANCES = { fp32: 0.01, fp16: 0.01, int8: 0.1 };

/** Something that the user can be told as it is. */
export class Told extends Error {
  name = "Told";
}

const ARRAYS = {
  F32: [Float32Array, "float32"], F64: [Float64Array, "float64"], I64: [BigInt64Array, "int64"],
  I32: [Int32Array, "int32"], U8: [Uint8Array, "uint8"], I8: [Int8Array, "int8"], BOOL: [Uint8Array, "bool"],
};

async function load(name, size, onProgress) {
  let answer;
  try {
    answer = await fetch(encodeURI(name).replace(/[?#]/g, encodeURIComponent));
  } catch (error) {
    throw new Told(`${name} could not be loaded (${error.message}); check the connection, and load the page again.`);
  }
  if (!answer.ok) throw new Told(`${name} could not be loaded (the server answers ${answer.status}); copy the whole folder to the server.`);
  if (!onProgress || !answer.body) return new Uint8Array(await answer.arrayBuffer());
  const parts = [];
  let loaded = 0;
  for (const reader = answer.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    loaded += value.length;
    onProgress(loaded, Math.max(size, loaded));
  }
  const whole = new Uint8Array(loaded);
  let place = 0;
  for (const part of parts) {
    whole.set(part, place);
    place += part.length;
  }
  return whole;
}

/** The tensors of a .safetensors file: 8 bytes of length, that many of JSON, then the numbers. */
function tensorsOf(bytes, ort) {
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const found = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [Array_, type] = ARRAYS[dtype];
    const own = bytes.slice(8 + length + from, 8 + length + to); // a copy, since numbers must begin at a multiple
    found[name] = new ort.Tensor(type, new Array_(own.buffer), shape);
  }
  return found;
}

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

/** The folder's model in one runtime; adapters are loaded when they are first asked for. */
export class Model {
  constructor(about) {
    this.about = about;
    this.tensors = new Map();
    this.last = Promise.resolve();
  }

  /** Load everything but adapters; `onProgress(bytes, of)`, the latter 0 when all are here. */
  static async open(onProgress) {
    if (typeof WebAssembly !== "object") {
      throw new Told("This browser has no WebAssembly, which the model needs; use a current Firefox, Chrome, Edge or Safari.");
    }
    const about = JSON.parse(new TextDecoder().decode(await load("adapters.json")));
    const model = new Model(about);
    const bytes = await load("backbone.onnx", about.page.backbone_bytes, onProgress);
    onProgress(0, 0);
    await model.start(bytes);
    return model;
  }

  async start(bytes) {
    this.ort = await import("./runtime/ort.wasm.min.mjs");
    this.ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
    // Threads need memory that is shared, which browsers give only to pages served with two headers.
    this.threads = globalThis.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1) : 1;
    this.ort.env.wasm.numThreads = this.threads;
    this.ort.env.logLevel = "error";
    this.session = await this.ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  }

  async adapter(name) {
    if (!this.tensors.has(name)) this.tensors.set(name, tensorsOf(await load(this.about.adapters[name].file), this.ort));
    return this.tensors.get(name);
  }

  /** Compare the answer to one picture with what onnxruntime answered when the folder was written; null: alike. */
  async check(name) {
    const { check } = this.about.adapters[name];
    const { logits } = await this.answer(name, new Blob([await load("check.png")], { type: "image/png" }));
    const largest = Math.max(...check.map(Math.abs));
    const difference = Math.max(...check.map((value, i) => Math.abs(value - logits[i])));
    this.difference = difference / largest;
    if (difference <= TOLERANCES[this.about.backbone.precision] * largest + 1e-6) return null;
    return `on the picture that checks it, this browser answers otherwise than the export did: a logit differs by ${(100 * this.difference).toPrecision(2)} % of the largest.`;
  }

  /** Answer one picture after the other. */
  answer(name, blob) {
    const turn = this.last.then(() => this.run(name, blob));
    this.last = turn.catch(() => {});
    return turn;
  }

  async run(name, blob) {
    const facts = this.about.adapters[name];
    const tensors = await this.adapter(name);
    const begin = performance.now();
    const { rgb, width, height, from, reduced } = await decode(blob, facts.background_rgb);
    const decoded = performance.now();
    const picture = new this.ort.Tensor("uint8", rgb, [1, height, width, 3]);
    const result = await this.session.run({ ...tensors, picture });
    const logits = Array.from(result.logits.data);
    const end = performance.now();
    const several = facts.task === "several_classes";
    return {
      adapter: name, several, logits, probabilities: probabilitiesOf(logits, several), from, size: [width, height],
      reduced, milliseconds: { decode: decoded - begin, answer: end - decoded },
    };
  }
}
