// Shared code of the runtimes: reads the job that a runtime gets, and writes its result (lab/matrix/matrix.py).

import { readFileSync, writeFileSync } from "node:fs";
import { endianness } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

// ONNX Runtime sends telemetry unless this says otherwise when it is loaded (transformers.js says so itself). What the
// user has set himself stays.
process.env.ORT_DISABLE_TELEMETRY ??= "1";

/** The folder js/, and the folder of its packages. */
export const JS = fileURLToPath(new URL("..", import.meta.url));
export const MODULES = join(JS, "node_modules");

/** The installed version of a package. */
export function version(name) {
  return JSON.parse(readFileSync(join(MODULES, name, "package.json"))).version;
}

/** Read the job, call `main(job)`, and write its result { version, whole, cached, generated, prompt_ids, skipped }. */
export async function runtime(main) {
  try {
    if (process.argv.length !== 3) throw new Error(`usage: node ${process.argv[1]} job.json`);
    if (endianness() !== "LE") throw new Error("logits must be written little-endian, but this processor is big-endian");
    const job = JSON.parse(readFileSync(process.argv[2]));
    const { whole, cached, ...rest } = await main(job);
    const result = { generated: null, prompt_ids: null, skipped: {}, ...rest, whole: null, cached: null };
    for (const [name, values] of Object.entries({ whole, cached })) {
      if (!values) continue;
      result[name] = `${name}.f32`;
      const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
      writeFileSync(join(job.output, result[name]), bytes);
    }
    writeFileSync(join(job.output, "result.json"), JSON.stringify(result));
    process.exitCode = 0;
  } catch (error) {
    console.error(oneLine(error));
    process.exitCode = 1;
  }
}

/** An error's message in one line, without its stack. */
export function oneLine(error) {
  return String(error?.message ?? error).split(/\s+/).join(" ").trim();
}
