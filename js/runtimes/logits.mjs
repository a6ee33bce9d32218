// The logits that every runtime is asked for. Runs in Node and in the browser.

/**
 * Logits of one job: `whole` of all ids at once, `cached` of the last token of the prefill, then of every further one.
 * @param model a CausalLM
 * @param job { ids: [int], prefill: int }
 */
export async function logits(model, { ids, prefill }) {
  model.reset();
  const whole = await model.run(ids);
  model.reset();
  const rows = [await model.step(ids.slice(0, prefill))];
  for (const id of ids.slice(prefill)) rows.push(await model.step([id]));
  return { whole, cached: concatenate(rows) };
}

/** One Float32Array of all rows. */
export function concatenate(rows) {
  const joined = new Float32Array(rows.reduce((sum, row) => sum + row.length, 0));
  let at = 0;
  for (const row of rows) {
    joined.set(row, at);
    at += row.length;
  }
  return joined;
}
