// A token map on a canvas: the token under the pointer, or under the cursor that the arrow keys move, lights up.
import { DROPPED, describe, type Pixels, paint, patchAt, type TokenMap } from "./tokens";

const SIDE = 336; // pixels that the longer side of a map has at least

export class MapView {
  readonly canvas: HTMLCanvasElement;
  private picture: Pixels | null = null;
  private map: TokenMap | null = null;
  private cursor = -1;

  /** `say` gets the description of a patch when it is pointed at, and an empty text after it. */
  constructor(private readonly say: (text: string) => void) {
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.light(-1));
    this.canvas.addEventListener("blur", () => this.light(-1));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
  }

  /** Show a picture; tiny ones are enlarged pixel by pixel. */
  setPicture(image: CanvasImageSource, width: number, height: number): void {
    const times = SIDE / Math.max(width, height);
    const factor = times >= 3 ? Math.round(times) : Math.max(1, times);
    this.canvas.width = Math.round(width * factor);
    this.canvas.height = Math.round(height * factor);
    const context = this.context();
    context.imageSmoothingEnabled = times < 3;
    context.drawImage(image, 0, 0, this.canvas.width, this.canvas.height);
    this.picture = context.getImageData(0, 0, this.canvas.width, this.canvas.height);
    this.draw();
  }

  /** Show a map, described by `label`. */
  setMap(map: TokenMap, label: string): void {
    this.map = map;
    this.canvas.setAttribute("aria-label", `${label} The arrow keys move over its patches.`);
    this.draw();
  }

  private context(): CanvasRenderingContext2D {
    return this.canvas.getContext("2d", { willReadFrequently: true })!;
  }

  private draw(): void {
    if (!this.picture || !this.map) return;
    const { width, height } = this.picture;
    const lit = this.cursor < 0 ? DROPPED : this.map.where[this.cursor];
    this.context().putImageData(new ImageData(paint(this.picture, this.map, lit), width, height), 0, 0);
  }

  private point(event: PointerEvent): void {
    if (!this.map) return;
    const box = this.canvas.getBoundingClientRect();
    this.light(patchAt(this.map, event.clientX - box.left, event.clientY - box.top, box.width, box.height));
  }

  private move(event: KeyboardEvent): void {
    const steps: Record<string, [number, number]> = {
      ArrowLeft: [0, -1],
      ArrowRight: [0, 1],
      ArrowUp: [-1, 0],
      ArrowDown: [1, 0],
    };
    const step = steps[event.key];
    if (!this.map || !step) return;
    event.preventDefault();
    const { rows, columns } = this.map;
    const [row, column] =
      this.cursor < 0 ? [0, 0] : [Math.floor(this.cursor / columns) + step[0], (this.cursor % columns) + step[1]];
    this.light(Math.min(rows - 1, Math.max(0, row)) * columns + Math.min(columns - 1, Math.max(0, column)));
  }

  private light(patch: number): void {
    if (patch === this.cursor) return;
    this.cursor = patch;
    this.say(patch < 0 || !this.map ? "" : describe(this.map, patch));
    this.draw();
  }
}
