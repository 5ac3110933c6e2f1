import { expect, test } from "vitest";
import { centred, cosine, median, normalised, planes, top } from "../src/numbers";

test("pixels are normalised in float32 and laid out by channels", () => {
  const data = Uint8ClampedArray.from([0, 128, 255, 255, 10, 20, 30, 255]);
  const out = planes(data, [0.5, 0.485, 0], [0.25, 0.229, 1]);
  expect(out).toHaveLength(6);
  expect(out[0]).toBe(-2);
  expect(out[5]).toBe(Math.fround(30 / 255));
  expect(out[2]).toBe(normalised(0.485, 0.229)[128]);
  expect(Math.abs(out[2] - (128 / 255 - 0.485) / 0.229)).toBeLessThan(1e-6);
});

test("a centre crop has the model's shape and the picture's middle", () => {
  expect(centred(400, 300, 100, 100, 1)).toEqual([50, 0, 300, 300]);
  expect(centred(300, 400, 100, 100, 0.5)).toEqual([75, 125, 150, 150]);
  expect(centred(400, 400, 50, 100, 1)).toEqual([0, 100, 400, 200]);
});

test("likeness does not depend on scale", () => {
  expect(cosine([1, 2, 3], [2, 4, 6])).toBeCloseTo(1, 12);
  expect(cosine([1, 0], [0, 5])).toBe(0);
  expect(cosine([1, 1], [-3, -3])).toBeCloseTo(-1, 12);
});

test("the first class has its softmax probability", () => {
  expect(top([0, Math.log(3), 0])).toEqual({ index: 1, share: expect.closeTo(3 / 5, 12) });
  expect(top([1000, 0]).share).toBe(1);
});

test("the median of an even number is between the middle two", () => {
  expect(median([9, 1, 5])).toBe(5);
  expect(median([4, 1, 3, 2])).toBe(2.5);
});
