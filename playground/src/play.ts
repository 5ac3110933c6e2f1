// The playground: a picture, a method and a keep rate; the map of its tokens block by block, and what it costs and changes.
import { type Answer, Engine, type Rate } from "./engine";
import { MapView } from "./map_view";
import { centred, cosine, median, planes, top } from "./numbers";
import { sizes, type TokenMap, unreduced } from "./tokens";

const ROUNDS = 10;
const STEP = 700; // milliseconds of a block where they are played

const one = <T extends Element>(selector: string): T => document.querySelector<T>(selector)!;
const fields = {
  method: one<HTMLSelectElement>("#method"),
  keep: one<HTMLInputElement>("#keep"),
  block: one<HTMLInputElement>("#block"),
  play: one<HTMLButtonElement>("#play"),
  file: one<HTMLInputElement>("#file"),
  measure: one<HTMLButtonElement>("#measure"),
};
const say = (name: string, text: string): void => {
  one(`#${name}`).textContent = text;
};

let engine: Engine;
let image: Float32Array; // the picture as the model takes it
let name = "";
let base: Answer | null = null;
let answer: Answer | null = null;
let rate: Rate;
let changed = 0; // when the user changed something
let shown = 0; // milliseconds from then until the map was drawn
let wanted = 0; // counts changes: only the newest is shown
let playing = 0;
const warmed = new Set<string>(); // graphs that have run

const view = new MapView((text) => say("patch", text || "Point at a patch, or move over the map with the arrow keys."));

/** What is shown now, for tests. */
export const state = (): object => ({
  ready: answer !== null && document.body.dataset.busy === undefined,
  picture: name,
  method: fields.method.value,
  keep: rate?.keep,
  maps: answer?.maps.map((map) => Array.from(map)),
  features: answer && Array.from(answer.features),
  shown,
  milliseconds: answer?.milliseconds,
  base: base?.milliseconds,
});

async function start(): Promise<void> {
  engine = await Engine.open();
  const { manifest } = engine;
  say(
    "about",
    `${manifest.model}: ${manifest.grid.join(" x ")} patches, ${manifest.image.join(" x ")} pixels, with its own weights.`,
  );
  fields.method.replaceChildren(...manifest.methods.map(({ name, title }) => new Option(title, name)));
  one("#map").append(view.canvas);
  const place = one("#pictures");
  for (const picture of manifest.pictures) {
    const button = document.createElement("button");
    const thumbnail = new Image();
    thumbnail.src = picture.file;
    thumbnail.alt = picture.name;
    button.type = "button";
    button.append(thumbnail);
    button.addEventListener("click", async () => take(await (await fetch(picture.file)).blob(), picture.name));
    place.append(button);
  }
  listen();
  chooseMethod();
  one<HTMLElement>("main").hidden = false;
  const first = manifest.pictures[0];
  await take(await (await fetch(first.file)).blob(), first.name);
}

function listen(): void {
  fields.method.addEventListener("change", () => {
    chooseMethod();
    void update();
  });
  fields.keep.addEventListener("input", () => void update());
  fields.block.addEventListener("input", () => {
    stop();
    draw();
  });
  fields.play.addEventListener("click", () => (playing ? stop() : playBlocks()));
  fields.measure.addEventListener("click", () => void measure());
  fields.file.addEventListener("change", () => {
    const file = fields.file.files?.[0];
    if (file) void take(file, file.name);
  });
  one("form").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    const file = event.dataTransfer?.files[0];
    if (file) void take(file, file.name);
  });
  document.addEventListener("paste", (event) => {
    const file = event.clipboardData?.files[0];
    if (file) void take(file, file.name || "pasted picture");
  });
}

function method() {
  return engine.manifest.methods.find((one) => one.name === fields.method.value)!;
}

/** Offer the keep rates of the chosen method, and stay as near as possible to the rate before. */
function chooseMethod(): void {
  const { rates } = method();
  const before = rate?.keep ?? 0.5;
  fields.keep.max = String(rates.length - 1);
  const nearest = rates.reduce(
    (best, one, i) => (Math.abs(one.keep - before) < Math.abs(rates[best].keep - before) ? i : best),
    0,
  );
  fields.keep.value = String(nearest);
}

/** Take a picture: its centre, resized to what the model takes. */
async function take(file: Blob, title: string): Promise<void> {
  changed = performance.now();
  let bitmap: ImageBitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    say("problem", `${title} is not a picture that this browser can read.`);
    return;
  }
  say("problem", "");
  const [rows, columns] = engine.manifest.image;
  const canvas = new OffscreenCanvas(columns, rows);
  const context = canvas.getContext("2d", { willReadFrequently: true })!;
  const exact = bitmap.width === columns && bitmap.height === rows;
  const [x, y, wide, high] = exact
    ? [0, 0, columns, rows]
    : centred(bitmap.width, bitmap.height, rows, columns, engine.manifest.crop);
  context.imageSmoothingEnabled = !exact;
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, x, y, wide, high, 0, 0, columns, rows);
  image = planes(context.getImageData(0, 0, columns, rows).data, engine.manifest.mean, engine.manifest.std);
  name = title;
  view.setPicture(canvas, columns, rows);
  base = null;
  await update(false);
}

/** Run the chosen method on the picture, and the unreduced model if the picture is new; show the newest choice only. */
async function update(fresh = true): Promise<void> {
  if (fresh) changed = performance.now();
  const mine = ++wanted;
  rate = method().rates[Number(fields.keep.value)];
  document.body.dataset.busy = "";
  one("#results").setAttribute("aria-busy", "true");
  say("rate", `${Math.round(rate.keep * 100)} %`);
  fields.keep.setAttribute("aria-valuetext", `${Math.round(rate.keep * 100)} %`);
  await new Promise((resolve) => setTimeout(resolve)); // the page shows the choice before the work, which blocks it
  if (mine !== wanted) return;
  const found = await engine.run(rate, image);
  if (mine !== wanted) return;
  answer = found;
  fields.block.max = String(rate.blocks.length);
  fields.block.value = String(rate.blocks.length);
  draw();
  shown = performance.now() - changed;
  const { unreduced: plain } = engine.manifest;
  if (!warmed.has(plain.graph)) {
    warmed.add(plain.graph); // the browser compiles the runtime during the first runs: their time says nothing
    await engine.run(plain, image);
  }
  const whole = base ?? (await engine.run(plain, image));
  if (mine !== wanted) return;
  base = whole;
  numbers();
  delete document.body.dataset.busy;
  one("#results").removeAttribute("aria-busy");
  warmed.add(rate.graph);
  if (engine.holdsAll) void warm();
}

/** Run the graphs that were not chosen yet, those of the chosen method first, so that a choice of them is shown at once. */
async function warm(): Promise<void> {
  const mine = wanted;
  const own = method();
  for (const { rates } of [own, ...engine.manifest.methods.filter((one) => one !== own)])
    for (const graph of rates) {
      if (warmed.has(graph.graph)) continue;
      await new Promise((resolve) => setTimeout(resolve, 20));
      if (mine !== wanted || fields.measure.disabled) return;
      warmed.add(graph.graph);
      await engine.run(graph, image);
    }
}

/** Draw the map after the chosen block. */
function draw(): void {
  if (!answer) return;
  const [rows, columns] = engine.manifest.grid;
  const stage = Number(fields.block.value);
  const map: TokenMap = stage ? { rows, columns, where: answer.maps[stage - 1] } : unreduced(rows, columns);
  const left = sizes(map).size;
  const when = stage ? `After block ${rate.blocks[stage - 1]} of the model` : "Before the first reducing block";
  const words = `${when}: ${left} of ${rows * columns} tokens`;
  say("when", words);
  fields.block.setAttribute("aria-valuetext", words);
  view.setMap(map, `Token map of ${name} under ${fields.method.value}. ${words}.`);
}

function numbers(): void {
  if (!answer || !base) return;
  const { unreduced: whole, classes } = engine.manifest;
  const times = (ratio: number): string => `${ratio.toFixed(2)} times fewer`;
  say("tokens", rate.tokens.join(" → "));
  say(
    "macs",
    `${(rate.macs / 1e9).toPrecision(3)} G of ${(whole.macs / 1e9).toPrecision(3)} G (${times(whole.macs / rate.macs)})`,
  );
  say("time", `${answer.milliseconds.toFixed(1)} ms; unreduced ${base.milliseconds.toFixed(1)} ms (one run each)`);
  say("similarity", cosine(answer.features, base.features).toFixed(4));
  const row = one<HTMLElement>("#answers");
  row.hidden = !answer.logits || !base.logits;
  if (!answer.logits || !base.logits) return;
  const [ours, theirs] = [top(answer.logits), top(base.logits)];
  const called = (index: number): string => classes[index] ?? `class ${index}`;
  const percent = (share: number): string => `${Math.round(share * 100)} %`;
  say("answer", `${called(ours.index)} (${percent(ours.share)}); unreduced ${called(theirs.index)} (${percent(theirs.share)})`);
}

/** Run both models in turns, and show the median ratio of their times. */
async function measure(): Promise<void> {
  if (document.body.dataset.busy !== undefined) return;
  const mine = wanted;
  fields.measure.disabled = true;
  const ratios: number[] = [];
  const own: number[] = [];
  for (let i = 0; i < ROUNDS && mine === wanted; i++) {
    say("time", `measuring, ${i + 1} of ${ROUNDS} …`);
    await new Promise((resolve) => setTimeout(resolve));
    const before = await engine.run(engine.manifest.unreduced, image);
    const found = await engine.run(rate, image);
    const after = await engine.run(engine.manifest.unreduced, image);
    own.push(found.milliseconds);
    ratios.push((before.milliseconds + after.milliseconds) / 2 / found.milliseconds);
  }
  fields.measure.disabled = false;
  if (mine !== wanted) return;
  const fast = `${median(ratios).toFixed(2)} times as fast as unreduced`;
  say("time", `${median(own).toFixed(1)} ms, ${fast} (median of ${ROUNDS} rounds, 1 thread of this browser)`);
}

function playBlocks(): void {
  fields.block.value = "0";
  draw();
  fields.play.textContent = "Stop";
  playing = window.setInterval(() => {
    if (Number(fields.block.value) >= rate.blocks.length) return stop();
    fields.block.value = String(Number(fields.block.value) + 1);
    draw();
  }, STEP);
}

function stop(): void {
  window.clearInterval(playing);
  playing = 0;
  fields.play.textContent = "Play";
}

start().catch((error: Error) => say("problem", `The playground cannot start: ${error.message}`));
