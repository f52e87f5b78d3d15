// Where the two graphs compute: resizing on the CPU, the backbone on WebGPU where the browser offers a GPU.

import { load, Told } from "./loading.js";

const MOST_THREADS = 4;
const DEVICES = ["wasm", "webgpu"];

async function runtime(file, threads) {
  const ort = await import(`./runtime/${file}`);
  ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  return ort;
}

/** Why the backbone cannot compute on WebGPU here, as "it ..."; null where it can. */
async function whyNoGpu(about, forced) {
  if (!about.page.runtime_files.includes("ort.jspi.min.mjs")) return "computes in int8, for which WebGPU has no form";
  if (!navigator.gpu) return "finds no WebGPU in this browser, or the page came neither by https nor from localhost";
  // By it WebAssembly waits for the GPU.
  if (!("Suspending" in WebAssembly)) return "needs JSPI, which this browser's WebAssembly has not";
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" }).catch(() => null);
  if (!adapter) return "gets no GPU from this browser";
  // One in software is slower than the CPU by itself, and serves tests only.
  return !forced && adapter.info?.isFallbackAdapter ? "finds a GPU in software only" : null;
}

export class Graphs {
  /** The graphs of a folder; `device`: wasm or webgpu, on which the backbone has to compute; null: whichever serves. */
  static async open(about, device, onProgress) {
    if (device !== null && !DEVICES.includes(device)) {
      throw new Told(`The address asks for the device “${device}”, but there are wasm and webgpu only.`);
    }
    const graphs = new Graphs();
    graphs.forced = device !== null;
    graphs.note = "";
    const reason = device === "wasm" ? "was asked not to" : await whyNoGpu(about, graphs.forced);
    if (device === "webgpu" && reason) {
      throw new Told(`The address asks for WebGPU, but the model ${reason}; open the page without ?device=webgpu.`);
    }
    const backbone = await load("backbone.onnx", about.page.backbone_bytes, onProgress);
    onProgress(0, 0);
    // Threads need memory that is shared, which browsers give only to pages served with two headers.
    graphs.threads = globalThis.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1) : 1;
    graphs.ort = await runtime("ort.wasm.min.mjs", graphs.threads);
    graphs.resize = await graphs.session(await load("resize.onnx"));
    if (reason) await graphs.toCpu("", backbone);
    else await graphs.toGpu(backbone);
    return graphs;
  }

  session(bytes) {
    return this.ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  }

  async toGpu(bytes) {
    try {
      const gpu = await runtime("ort.jspi.min.mjs", 1);
      this.backbone = await gpu.InferenceSession.create(bytes, { executionProviders: ["webgpu"] });
      this.broken = failureOf(await gpu.env.webgpu.device);
      this.device = "webgpu";
    } catch (error) {
      await this.gpuFailed(error, bytes);
    }
  }

  /** Let the CPU compute from now on, and note why, in words that follow "because". */
  async toCpu(reason, bytes) {
    if (this.device === "wasm") return;
    this.backbone = await this.session(bytes ?? await load("backbone.onnx"));
    this.note = reason;
    this.device = "wasm";
  }

  async gpuFailed(error, bytes) {
    const told = String(error?.message ?? error).split("\n")[0].replace(/[.\s]+$/, "").slice(0, 300);
    if (this.forced) throw new Told(`WebGPU failed: ${told}. Load the page again, or open it without ?device=webgpu.`);
    await this.toCpu(`WebGPU failed: ${told}`, bytes);
  }

  /** The logits of a picture with an adapter's tensors, and the device that computed them. */
  async run(rgb, [height, width], tensors) {
    const picture = new this.ort.Tensor("uint8", rgb, [1, height, width, 3]);
    const { pixels } = await this.resize.run({ picture });
    const feeds = { ...tensors, pixels };
    if (this.device === "webgpu") {
      try {
        return answerOf(await Promise.race([this.backbone.run(feeds), this.broken]), this.device);
      } catch (error) {
        await this.gpuFailed(error);
      }
    }
    return answerOf(await this.backbone.run(feeds), this.device);
  }
}

function answerOf({ logits }, device) {
  return { logits: Array.from(logits.data), device };
}

/** A promise that fails where the GPU is lost or reports an error, of which a run by itself need not hear. */
function failureOf(device) {
  const failure = new Promise((_, fail) => {
    device.lost.then(({ message }) => fail(new Error(message || "the GPU was lost")));
    device.addEventListener("uncapturederror", ({ error }) => fail(error));
  });
  failure.catch(() => {}); // told where a picture is answered
  return failure;
}
