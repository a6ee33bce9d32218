// Chooses a token from logits.

/** A generator of numbers in [0, 1) from an integer seed. The same seed gives the same numbers in every browser. */
export function generator(seed) {
  let state = seed >>> 0;
  return () => {
    // A Weyl sequence, mixed by multiplications and shifts. 32 bits of state are enough for a few hundred draws.
    state = (state + 0x9e3779b9) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 16), 0x85ebca6b);
    mixed = Math.imul(mixed ^ (mixed >>> 13), 0xc2b2ae35);
    return ((mixed ^ (mixed >>> 16)) >>> 0) / 2 ** 32;
  };
}

/** The `count` likeliest tokens, the likeliest first. Equal ones keep the order of the vocabulary. */
export function top(logits, count) {
  const tokens = [];
  for (let token = 0; token < logits.length; token++) {
    if (tokens.length === count && logits[token] <= logits[tokens[count - 1]]) continue;
    let at = tokens.length;
    while (at > 0 && logits[tokens[at - 1]] < logits[token]) at--;
    tokens.splice(at, 0, token);
    if (tokens.length > count) tokens.pop();
  }
  return tokens;
}

/**
 * Draw one token from softmax(logits / temperature) over the `topK` likeliest. Temperature 0 takes the likeliest.
 * @param logits Float32Array [V]
 * @param random gives a number in [0, 1)
 */
export function sample(logits, { temperature, topK }, random) {
  if (temperature === 0) return top(logits, 1)[0];
  const tokens = top(logits, topK);
  const weights = tokens.map((token) => Math.exp((logits[token] - logits[tokens[0]]) / temperature));
  let left = random() * weights.reduce((sum, weight) => sum + weight, 0);
  const index = weights.findIndex((weight) => (left -= weight) < 0);
  return tokens[index < 0 ? tokens.length - 1 : index]; // rounding errors can leave a rest past the end
}

/** The median of numbers; null if there are none. */
export function median(values) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}
