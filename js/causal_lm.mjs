// Runs an artifact's graph in JavaScript with ONNX Runtime, with or without the KV cache.
// It works with onnxruntime-node and with onnxruntime-web.

export class CausalLM {
  #ort;
  #session;
  #past; // [{ past, present, heads, width }], one for every key and value
  #cache = {};
  #length = 0;

  /**
   * @param ort the onnxruntime module that `session` was made with
   * @param session an InferenceSession of an artifact's graph
   */
  constructor(ort, session) {
    this.#ort = ort;
    this.#session = session;
    this.#past = session.inputMetadata
      .filter(({ name }) => name.startsWith("past_key_values."))
      .map(({ name, shape }) => ({
        past: name,
        present: name.replace("past_key_values", "present"),
        heads: shape[1],
        width: shape[3],
      }));
    const missing = ["logits", ...this.#past.map(({ present }) => present)].filter(
      (name) => !session.outputNames.includes(name),
    );
    if (missing.length || !this.#past.length) {
      throw new Error(`the graph lacks ${missing[0] ?? "past_key_values"}; use an artifact's model.onnx`);
    }
    this.reset();
  }

  /** The number of tokens in the KV cache. */
  get length() {
    return this.#length;
  }

  /** Empty the KV cache. */
  reset() {
    for (const tensor of Object.values(this.#cache)) tensor.dispose();
    this.#cache = Object.fromEntries(
      this.#past.map(({ past, heads, width }) => [
        past,
        new this.#ort.Tensor("float32", new Float32Array(0), [1, heads, 0, width]),
      ]),
    );
    this.#length = 0;
  }

  /** Append T token ids to the KV cache and return their logits, a Float32Array of T × V. */
  async run(ids) {
    const end = this.#length + ids.length;
    const feeds = {
      input_ids: this.#int64(ids),
      attention_mask: this.#int64(new Array(end).fill(1)),
      position_ids: this.#int64(ids.map((_, index) => this.#length + index)),
      ...this.#cache,
    };
    for (const name of Object.keys(feeds)) if (!this.#session.inputNames.includes(name)) delete feeds[name];
    const outputs = await this.#session.run(feeds);
    for (const { past, present } of this.#past) {
      this.#cache[past].dispose();
      this.#cache[past] = outputs[present];
    }
    this.#length = end;
    const { data } = outputs.logits;
    for (const name of ["input_ids", "attention_mask", "position_ids"]) feeds[name]?.dispose();
    return data;
  }

  /** Append token ids to the KV cache and return the logits of the last one, a Float32Array of V. onnxruntime-web cannot
   * feed an input that has a default value (num_logits_to_keep), so the graph computes the logits of all tokens, and the
   * others are dropped here. */
  async step(ids) {
    const logits = await this.run(ids);
    return logits.subarray(logits.length - logits.length / ids.length);
  }

  /** Release the session and its memory. */
  async release() {
    this.reset();
    await this.#session.release();
  }

  #int64(values) {
    return new this.#ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  }
}
