// Computes the logits that every runtime must give. This runs in Node and in the browser.

/**
 * The logits of one job. `whole` are those of all ids in one pass. `cached` are those of the last token of the prefill,
 * and then of every further token through the KV cache.
 * @param model a CausalLM
 * @param job { ids: [int], prefill: int }
 */
export async function logits(model, { ids, prefill }) {
  model.reset();
  const whole = await model.run(ids);
  model.reset();
  const parts = [await model.step(ids.slice(0, prefill))];
  for (const id of ids.slice(prefill)) parts.push(await model.step([id]));
  return { whole, cached: concatenate(parts) };
}

/** Join arrays of logits to one Float32Array. */
export function concatenate(parts) {
  const joined = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    joined.set(part, at);
    at += part.length;
  }
  return joined;
}
