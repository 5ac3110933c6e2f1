// Maps of patches to tokens: which patches share a token, and their pictures. Nothing here needs a browser.

/** One image after one block: `where[p]` is the token that holds patch p, or -1 where the patch was dropped. */
export interface TokenMap {
  rows: number;
  columns: number;
  where: ArrayLike<number>;
}

export interface Pixels {
  width: number;
  height: number;
  data: Uint8ClampedArray;
}

export const DROPPED = -1;
const DARK = 0.22; // what is left of a dropped patch's light, and the grey over it; as laconic.cli.draw has them
const SHADOW = 18;
const OUTLINE = 0.45; // of white in the line between two tokens
const LIT: readonly number[] = [255, 176, 0];

/** The number of patches of every token. */
export function sizes(map: TokenMap): Map<number, number> {
  const found = new Map<number, number>();
  for (let p = 0; p < map.where.length; p++) {
    const token = map.where[p];
    if (token !== DROPPED) found.set(token, (found.get(token) ?? 0) + 1);
  }
  return found;
}

/** The patches of one token. */
export function patchesOf(map: TokenMap, token: number): number[] {
  return Array.from(map.where, (holder, p) => (holder === token ? p : -1)).filter((p) => p >= 0);
}

/** The patch under a point of a picture of this size. */
export function patchAt(map: TokenMap, x: number, y: number, width: number, height: number): number {
  const column = Math.min(map.columns - 1, Math.max(0, Math.floor((x * map.columns) / width)));
  const row = Math.min(map.rows - 1, Math.max(0, Math.floor((y * map.rows) / height)));
  return row * map.columns + column;
}

/** A patch and its token, in words. */
export function describe(map: TokenMap, patch: number): string {
  const place = `Patch in row ${Math.floor(patch / map.columns) + 1}, column ${(patch % map.columns) + 1}`;
  const token = map.where[patch];
  if (token === DROPPED) return `${place}: dropped.`;
  const count = patchesOf(map, token).length;
  return `${place}: ${count === 1 ? "a token of its own" : `one of ${count} patches of a token`}.`;
}

/** The map before the first block: every patch is a token of its own. */
export function unreduced(rows: number, columns: number): TokenMap {
  return { rows, columns, where: Array.from({ length: rows * columns }, (_, p) => p) };
}

/**
 * Paint a map on a picture: patches that share a token get their mean colour, tokens get thin outlines, dropped patches are
 * dimmed, and the patches of the token `lit` get a frame.
 */
export function paint(picture: Pixels, map: TokenMap, lit = DROPPED): Uint8ClampedArray<ArrayBuffer> {
  const { width, height, data } = picture;
  const cells = new Int32Array(width * height);
  for (let y = 0, i = 0; y < height; y++) {
    const row = Math.floor((y * map.rows) / height) * map.columns;
    for (let x = 0; x < width; x++, i++) cells[i] = row + Math.floor((x * map.columns) / width);
  }
  const mean = means(data, cells, map);
  const out = new Uint8ClampedArray(data.length);
  for (let i = 0; i < cells.length; i++) {
    const token = map.where[cells[i]];
    const colour = mean.get(token);
    const edge = lineAt(i, width, cells, map, 1);
    const bright = token === lit && token !== DROPPED;
    const thick = bright && lineAt(i, width, cells, map, 2);
    for (let c = 0; c < 3; c++) {
      let value = data[4 * i + c];
      if (token === DROPPED) value = (DARK * (data[4 * i] + data[4 * i + 1] + data[4 * i + 2])) / 3 + SHADOW;
      else if (colour) value = colour[c];
      if (bright) value = 0.65 * value + 0.35 * LIT[c];
      if (thick) value = LIT[c];
      else if (edge && token !== DROPPED) value = OUTLINE * 255 + (1 - OUTLINE) * value;
      out[4 * i + c] = value;
    }
    out[4 * i + 3] = 255;
  }
  return out;
}

/** The mean colours of the tokens that hold several patches. */
function means(data: Uint8ClampedArray, cells: Int32Array, map: TokenMap): Map<number, number[]> {
  const several = new Map([...sizes(map)].filter(([, count]) => count > 1).map(([token]) => [token, [0, 0, 0, 0]]));
  for (let i = 0; i < cells.length; i++) {
    const sum = several.get(map.where[cells[i]]);
    if (!sum) continue;
    for (let c = 0; c < 3; c++) sum[c] += data[4 * i + c];
    sum[3]++;
  }
  for (const sum of several.values()) for (let c = 0; c < 3; c++) sum[c] /= sum[3];
  return several;
}

/** True if a pixel is at the border of its token, up to `reach` pixels inside. */
function lineAt(i: number, width: number, cells: Int32Array, map: TokenMap, reach: number): boolean {
  const token = map.where[cells[i]];
  const x = i % width;
  for (let step = 1; step <= reach; step++) {
    if (x >= step && map.where[cells[i - step]] !== token) return true;
    if (i >= step * width && map.where[cells[i - step * width]] !== token) return true;
    if (reach > 1 && x + step < width && map.where[cells[i + step]] !== token) return true;
    if (reach > 1 && i + step * width < cells.length && map.where[cells[i + step * width]] !== token) return true;
  }
  return false;
}
