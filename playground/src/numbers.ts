// Numbers of the playground: pixels as the model takes them, likeness, probabilities, times. Nothing here needs a browser.

/** The values of a channel for all bytes, normalised in float32 as PyTorch does. */
export function normalised(mean: number, deviation: number): Float32Array {
  const f = Math.fround;
  return Float32Array.from({ length: 256 }, (_, value) => f(f(f(value / 255) - f(mean)) / f(deviation)));
}

/** RGBA bytes as an image [3, H, W] for the model. */
export function planes(data: Uint8ClampedArray, mean: readonly number[], deviation: readonly number[]): Float32Array {
  const count = data.length / 4;
  const out = new Float32Array(3 * count);
  for (let c = 0; c < 3; c++) {
    const table = normalised(mean[c], deviation[c]);
    for (let i = 0; i < count; i++) out[c * count + i] = table[data[4 * i + c]];
  }
  return out;
}

/** The part of a picture that a centre crop keeps: a rectangle of the model's shape, smaller by `crop`. */
export function centred(
  width: number,
  height: number,
  rows: number,
  columns: number,
  crop: number,
): [number, number, number, number] {
  const scale = Math.min(width / columns, height / rows) * crop;
  const [wide, high] = [columns * scale, rows * scale];
  return [(width - wide) / 2, (height - high) / 2, wide, high];
}

export function cosine(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let [dot, left, right] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    dot += a[i] * b[i];
    left += a[i] * a[i];
    right += b[i] * b[i];
  }
  return dot / Math.sqrt(left * right);
}

/** The largest class probability and its class. */
export function top(logits: ArrayLike<number>): { index: number; share: number } {
  const values = Array.from(logits);
  const highest = Math.max(...values);
  const sum = values.reduce((total, value) => total + Math.exp(value - highest), 0);
  return { index: values.indexOf(highest), share: 1 / sum };
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}
