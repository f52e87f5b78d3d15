// The files of the folder, and errors that the user can be told.

/** Something that the user can be told as it is. */
export class Told extends Error {
  name = "Told";
}

const ARRAYS = {
  F32: [Float32Array, "float32"], F64: [Float64Array, "float64"], I64: [BigInt64Array, "int64"],
  I32: [Int32Array, "int32"], U8: [Uint8Array, "uint8"], I8: [Int8Array, "int8"], BOOL: [Uint8Array, "bool"],
};

/** The bytes of a file of the folder; `onProgress(bytes, of)` where it is large. */
export async function load(name, size, onProgress) {
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
export function tensorsOf(bytes, ort) {
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
