// Runs the model in a thread of its own, so that the page stays responsive. It receives the messages
// { type: "generate", ... } and { type: "stop" }, and sends "progress", "ready", "text", "done" and "failed".

import { CausalLM } from "./causal_lm.js";
import * as ort from "./ort.js";
import { generator, median, sample } from "./sampling.js";
import { Tokenizer } from "./tokenizers.js";

let loading = null;
let stopped = false;

/** Download a file and return its bytes. `seen(count)` is called with the size of each piece that arrives. */
async function download(name, seen) {
  let response;
  try {
    response = await fetch(new URL(name, import.meta.url));
  } catch (error) {
    throw new Error(`${name}: ${error.message}`);
  }
  if (!response.ok) throw new Error(`${name}: HTTP ${response.status}`);
  const parts = [];
  let length = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    length += part.value.length;
    seen(part.value.length);
  }
  const bytes = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

const json = async (name) => JSON.parse(new TextDecoder().decode(await download(name, () => {})));

async function load(threads) {
  const about = await json("demo.json");
  const total = about.bytes.model + about.bytes.runtime;
  let loaded = 0;
  const seen = (count) => {
    loaded += count;
    postMessage({ type: "progress", loaded, total });
  };
  const [weights, binary, vocabulary, settings] = await Promise.all([
    download("model.onnx", seen),
    download("ort-wasm.wasm", seen),
    json("tokenizer.json"),
    json("tokenizer_config.json"),
  ]);
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmBinary = binary.buffer;
  ort.env.wasm.wasmPaths = { mjs: new URL("ort-wasm.js", import.meta.url).href };
  const session = await ort.InferenceSession.create(weights, { executionProviders: ["wasm"], logSeverityLevel: 3 });
  postMessage({ type: "ready", threads: ort.env.wasm.numThreads });
  return { about, model: new CausalLM(ort, session), tokenizer: new Tokenizer(vocabulary, settings) };
}

/** Let waiting messages be handled: while WebAssembly computes a token, this thread cannot receive any. */
function breathe() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

function decode(tokenizer, ids) {
  if (!ids.length) return "";
  return tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
}

async function generate({ threads, prompt, length, temperature, topK, seed }) {
  stopped = false;
  loading ??= load(threads);
  const { about, model, tokenizer } = await loading;
  const random = generator(seed);
  const text = prompt ? tokenizer.encode(prompt, { add_special_tokens: false }).ids : [];
  while (text[0] === about.start) text.shift(); // a prompt may begin with the start token's own text
  const count = Math.min(length, about.positions - 2);
  // If the text is too long for the model's context, its beginning is cut off, so that the answer still fits.
  const kept = text.slice(Math.max(0, text.length - (about.positions - 1 - count)));
  const ids = [];
  const times = [];
  let first = null;
  let reason = "length";
  model.reset();
  for (let next = [about.start, ...kept]; ; next = ids.slice(-1)) {
    await breathe();
    if (stopped) {
      reason = "stopped";
      break;
    }
    const start = performance.now();
    const token = sample(await model.step(next), { temperature, topK }, random);
    const elapsed = performance.now() - start;
    if (first === null) first = elapsed;
    else times.push(elapsed);
    if (about.end.includes(token)) {
      reason = "end";
      break;
    }
    ids.push(token);
    if (ids.length === count) break;
    // A character that is not complete yet decodes to U+FFFD. It is shown when the next token completes it.
    report("text", decode(tokenizer, ids).replace(/\uFFFD+$/, ""));
  }
  report("done", decode(tokenizer, ids), { reason, dropped: text.length - kept.length });

  function report(type, text, more = {}) {
    const middle = median(times);
    postMessage({ type, text, tokens: ids.length, first, perSecond: middle && 1000 / middle, ...more });
  }
}

self.onmessage = async ({ data }) => {
  if (data.type === "stop") {
    stopped = true;
    return;
  }
  try {
    await generate(data);
  } catch (error) {
    postMessage({ type: "failed", detail: String(error?.message ?? error).split("\n")[0] });
  }
};
