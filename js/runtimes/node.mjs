// Runs a job in onnxruntime-node: `node js/runtimes/node.mjs job.json`.

import { join } from "node:path";
import { runtime, version } from "./common.mjs"; // before onnxruntime-node, whose telemetry it switches off
import ort from "onnxruntime-node";
import { CausalLM } from "../causal_lm.mjs";
import { logits } from "./logits.mjs";

const NO_LOOP = "onnxruntime-node runs graphs; it has no generation loop or tokenizer";

await runtime(async (job) => {
  const session = await ort.InferenceSession.create(join(job.folder, "model.onnx"), {
    executionProviders: ["cpu"],
    intraOpNumThreads: job.threads,
    interOpNumThreads: 1,
    logSeverityLevel: 3,
  });
  const model = new CausalLM(ort, session);
  return {
    version: `onnxruntime-node ${version("onnxruntime-node")}`,
    ...(await logits(model, job)),
    skipped: { generated: NO_LOOP, prompt_ids: NO_LOOP },
  };
});
