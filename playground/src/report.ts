// The script of a report: the chart becomes interactive, and the pictures show every block of every method.
import { MapView } from "./map_view";
import { sizes, type TokenMap, unreduced } from "./tokens";

interface Variant {
  label: string;
  blocks: number[];
  where: string; // base64 of int16 [pictures, blocks, patches]
}

interface Maps {
  grid: [number, number];
  variants: Variant[];
}

declare global {
  interface Window {
    vegaEmbed?: (place: HTMLElement, spec: object, options: object) => Promise<unknown>;
  }
}

function charts(): void {
  for (const figure of document.querySelectorAll<HTMLElement>(".chart")) {
    const plot = figure.querySelector<HTMLElement>(".plot")!;
    const spec = JSON.parse(figure.querySelector(".spec")!.textContent!);
    const still = plot.innerHTML;
    const place = document.createElement("div");
    place.style.width = "100%";
    plot.replaceChildren(place);
    spec.config.legend.columns = plot.clientWidth < 480 ? 2 : 4;
    window.vegaEmbed?.(place, spec, { actions: false, renderer: "svg" }).then(
      () => figure.querySelector(".scripted")?.removeAttribute("hidden"),
      () => {
        plot.innerHTML = still;
      },
    );
  }
}

function decoded(text: string): Int16Array {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Int16Array(bytes.buffer); // little-endian, as all browsers are
}

async function gallery(place: HTMLElement): Promise<void> {
  const { grid, variants }: Maps = JSON.parse(place.querySelector(".data")!.textContent!);
  const [rows, columns] = grid;
  const form = place.querySelector<HTMLFormElement>(".controls")!;
  const variant = form.querySelector<HTMLSelectElement>(".variant")!;
  const block = form.querySelector<HTMLInputElement>(".block")!;
  const state = form.querySelector<HTMLOutputElement>(".state")!;
  const figures = [...place.querySelectorAll<HTMLElement>("figure[data-number]")];
  let summary = "";
  const views: MapView[] = [];
  for (const figure of figures) {
    const image = figure.querySelector<HTMLImageElement>(".source")!;
    await image.decode();
    const view = new MapView((text) => {
      state.value = text || summary;
    });
    view.setPicture(image, image.naturalWidth, image.naturalHeight);
    figure.querySelector(".images")!.append(view.canvas);
    figure.classList.add("mapped");
    views.push(view);
  }

  const show = (): void => {
    const { label, blocks, where } = variants[Number(variant.value)];
    const all = decoded(where);
    const stage = Number(block.value);
    const patches = rows * columns;
    let tokens = 0;
    views.forEach((view, i) => {
      const start = (i * blocks.length + stage - 1) * patches;
      const map: TokenMap = stage ? { rows, columns, where: all.subarray(start, start + patches) } : unreduced(rows, columns);
      const left = sizes(map).size;
      tokens += left;
      view.setMap(map, `${figures[i].querySelector("img")!.alt}: ${left} of ${patches} tokens under ${label}.`);
    });
    const when = stage ? `after block ${blocks[stage - 1]}` : "before the first block that reduces";
    summary = `${when}: ${Math.round(tokens / views.length)} of ${patches} tokens, mean`;
    state.value = summary;
    block.setAttribute("aria-valuetext", summary);
  };
  const restart = (): void => {
    const count = variants[Number(variant.value)].blocks.length;
    block.max = String(count);
    block.value = String(count);
    show();
  };
  variant.addEventListener("change", restart);
  block.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  restart();
}

charts();
for (const place of document.querySelectorAll<HTMLElement>(".gallery.maps")) void gallery(place);
