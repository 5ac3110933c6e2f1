import { expect, describe as group, test } from "vitest";
import { DROPPED, describe, paint, patchAt, patchesOf, sizes, unreduced } from "../src/tokens";

const picture = (width: number, height: number) => {
  const data = new Uint8ClampedArray(4 * width * height);
  for (let i = 0; i < width * height; i++) data.set([i % 251, (7 * i) % 251, (13 * i) % 251, 255], 4 * i);
  return { width, height, data };
};
const pixel = (data: Uint8ClampedArray, width: number, x: number, y: number) => [
  ...data.slice(4 * (y * width + x), 4 * (y * width + x) + 3),
];
// two rows of three patches: two share a token, one is dropped
const map = { rows: 2, columns: 3, where: [0, 0, 1, DROPPED, 2, 3] };

group("maps", () => {
  test("count the patches of tokens, and leave dropped ones out", () => {
    expect([...sizes(map)]).toEqual([
      [0, 2],
      [1, 1],
      [2, 1],
      [3, 1],
    ]);
    expect(patchesOf(map, 0)).toEqual([0, 1]);
    expect(sizes(unreduced(3, 4)).size).toBe(12);
  });

  test("find the patch under a point, also at the borders", () => {
    expect(patchAt(map, 0, 0, 30, 20)).toBe(0);
    expect(patchAt(map, 29.9, 19.9, 30, 20)).toBe(5);
    expect(patchAt(map, 30, 20, 30, 20)).toBe(5);
    expect(patchAt(map, 15, 15, 30, 20)).toBe(4);
  });

  test("say what became of a patch", () => {
    expect(describe(map, 1)).toContain("row 1, column 2: one of 2 patches");
    expect(describe(map, 3)).toContain("dropped");
    expect(describe(map, 5)).toContain("a token of its own");
  });
});

group("paint", () => {
  const source = picture(30, 20);
  const out = paint(source, map);

  test("gives patches of one token one colour: their mean", () => {
    const inside = pixel(out, 30, 5, 5);
    expect(pixel(out, 30, 14, 8)).toEqual(inside);
    const sum = [0, 0, 0];
    for (let y = 0; y < 10; y++)
      for (let x = 0; x < 20; x++)
        pixel(source.data, 30, x, y).forEach((v, c) => {
          sum[c] += v / 200;
        });
    for (const c of [0, 1, 2]) expect(Math.abs(sum[c] - inside[c])).toBeLessThanOrEqual(0.51);
  });

  test("leaves a patch with a token of its own as it was, inside of its outline", () => {
    expect(pixel(out, 30, 25, 5)).toEqual(pixel(source.data, 30, 25, 5));
    expect(pixel(out, 30, 20, 5)).not.toEqual(pixel(source.data, 30, 20, 5));
  });

  test("dims dropped patches", () => {
    const [r, g, b] = pixel(out, 30, 5, 15);
    expect(r).toBe(g);
    expect(g).toBe(b);
    expect(r).toBeLessThan(75);
  });

  test("lights up all patches of one token and nothing else", () => {
    const lit = paint(source, map, 0);
    expect(pixel(lit, 30, 15, 5)).not.toEqual(pixel(out, 30, 15, 5));
    expect(pixel(lit, 30, 25, 5)).toEqual(pixel(out, 30, 25, 5));
    expect(paint(source, map, DROPPED)).toEqual(out);
  });

  test("of no reduction keeps every pixel but the outlines", () => {
    const plain = paint(source, unreduced(2, 3));
    expect(pixel(plain, 30, 5, 15)).toEqual(pixel(source.data, 30, 5, 15));
  });
});
