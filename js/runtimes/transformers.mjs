// Runs a job in transformers.js in Node, with its own tokenizer and generation loop:
// `node js/runtimes/transformers.mjs job.json`.

import { mkdirSync, mkdtempSync, readdirSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join, resolve } from "node:path";
import {
  AutoModelForCausalLM,
  AutoTokenizer,
  DynamicCache,
  LogLevel,
  Tensor,
  env,
} from "@huggingface/transformers";
import { runtime, version } from "./common.mjs";
import { concatenate } from "./logits.mjs";

// The library finds a file by the name of its dtype. The name has no influence on how the file runs.
const DTYPES = [
  [/^int8/, "q8", "_quantized"],
  [/^int4/, "q4", "_q4"],
  [/^fp16/, "fp16", "_fp16"],
  [/^/, "fp32", ""],
];

/** Lay out `folder` as the library expects it: the graph is in onnx/, with the file name of its dtype. */
function layout(artifact, folder, suffix) {
  mkdirSync(join(folder, "onnx"), { recursive: true });
  for (const name of readdirSync(artifact)) {
    const graph = name === "model.onnx" ? `model${suffix}.onnx` : name;
    // model.onnx.data goes beside the graph under its own name, to which the graph refers.
    const target = name.startsWith("model.onnx") ? join("onnx", graph) : name;
    symlinkSync(join(resolve(artifact), name), join(folder, target));
  }
}

const int64 = (ids) => new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
const ones = (count) => int64(new Array(count).fill(1));
const numbers = (tensor) => Array.from(tensor.data, Number);

await runtime(async (job) => {
  const [, dtype, suffix] = DTYPES.find(([pattern]) => pattern.test(basename(resolve(job.folder))));
  const folder = mkdtempSync(join(tmpdir(), "cuantiza-transformers-"));
  try {
    layout(job.folder, join(folder, "model"), suffix);
    env.allowRemoteModels = false;
    env.localModelPath = folder;
    env.logLevel = LogLevel.ERROR;
    const tokenizer = await AutoTokenizer.from_pretrained("model");
    const model = await AutoModelForCausalLM.from_pretrained("model", {
      dtype,
      device: "cpu",
      session_options: { intraOpNumThreads: job.threads, interOpNumThreads: 1, logSeverityLevel: 3 },
    });

    const { logits: whole } = await model({ input_ids: int64(job.ids), attention_mask: ones(job.ids.length) });
    const vocabulary = whole.dims.at(-1);

    const past_key_values = new DynamicCache();
    const steps = [];
    for (let at = 0; at < job.ids.length; ) {
      const count = at === 0 ? job.prefill : 1;
      const outputs = await model({
        input_ids: int64(job.ids.slice(at, at + count)),
        attention_mask: ones(at + count),
        past_key_values,
      });
      steps.push(outputs.logits.data.subarray(-vocabulary));
      at += count;
      for (const [name, tensor] of Object.entries(outputs)) {
        if (name.startsWith("present.")) {
          past_key_values.update({ [name.replace("present", "past_key_values")]: tensor });
        }
      }
    }

    const prompt_ids = numbers((await tokenizer(job.prompt, { add_special_tokens: false })).input_ids);
    const start = model.config.bos_token_id ?? model.config.eos_token_id;
    const input = [start, ...prompt_ids];
    const sequences = await model.generate({
      inputs: int64(input),
      attention_mask: ones(input.length),
      do_sample: false,
      max_new_tokens: job.generate,
      eos_token_id: null, // do not stop early at an end token
    });
    return {
      version: [
        `transformers.js ${version("@huggingface/transformers")}`,
        `(onnxruntime-node ${version("onnxruntime-node")})`,
      ].join(" "),
      whole: whole.data,
      cached: concatenate(steps),
      generated: numbers(sequences).slice(input.length),
      prompt_ids,
    };
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
});
