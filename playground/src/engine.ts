// Run the graphs of the playground with onnxruntime-web: the weights are loaded once and handed to every session.
import type * as Ort from "onnxruntime-web";

export interface Graph {
  graph: string; // file, compressed with gzip
  macs: number;
  tokens: number[]; // patches, then patch tokens after each block that reduces
  blocks: number[];
}

export interface Rate extends Graph {
  keep: number;
}

export interface Manifest {
  model: string;
  image: [number, number]; // rows and columns of pixels
  grid: [number, number];
  mean: number[];
  std: number[];
  crop: number;
  head: boolean;
  classes: string[];
  weights: { file: string; bytes: number };
  unreduced: Graph;
  methods: { name: string; title: string; rates: Rate[] }[];
  pictures: { file: string; name: string }[];
}

export interface Answer {
  features: Float32Array;
  logits: Float32Array | null;
  maps: Int32Array[];
  milliseconds: number; // of the run alone
}

const RUNTIME = "./runtime/"; // the folder of onnxruntime-web's files
const MEMORY = 400e6; // bytes of weights that open sessions may hold together

// The graphs are optimised when they are exported. Packed copies of the weights make a session slow to open, and no faster.
const OPTIONS: Ort.InferenceSession.SessionOptions = {
  executionProviders: ["wasm"],
  graphOptimizationLevel: "disabled",
  extra: { session: { disable_prepacking: "1" } },
};

async function bytes(file: string, packed: boolean): Promise<Uint8Array> {
  const response = await fetch(file);
  if (!response.ok || !response.body) throw new Error(`${file} cannot be loaded: ${response.status} ${response.statusText}`);
  const body = packed ? response.body.pipeThrough(new DecompressionStream("gzip")) : response.body;
  return new Uint8Array(await new Response(body).arrayBuffer());
}

export class Engine {
  private last: Promise<unknown> = Promise.resolve(); // the runtime runs one graph at a time
  private readonly sessions = new Map<string, Promise<Ort.InferenceSession>>();

  private constructor(
    private readonly ort: typeof Ort,
    readonly manifest: Manifest,
    private readonly weights: Uint8Array,
  ) {}

  static async open(): Promise<Engine> {
    const address = new URL(`${RUNTIME}ort.wasm.min.mjs`, document.baseURI).href;
    const [ort, binary, manifest] = await Promise.all([
      import(/* @vite-ignore */ address) as Promise<typeof Ort>,
      bytes(`${RUNTIME}ort-wasm-simd-threaded.wasm.gz`, true),
      fetch("playground.json").then((response) => response.json() as Promise<Manifest>),
    ]);
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmBinary = binary.buffer as ArrayBuffer;
    ort.env.wasm.wasmPaths = new URL(RUNTIME, document.baseURI).href;
    ort.env.logLevel = "error";
    return new Engine(ort, manifest, await bytes(manifest.weights.file, false));
  }

  /** True if the sessions of all graphs may be open at once. */
  get holdsAll(): boolean {
    const count = this.manifest.methods.reduce((sum, { rates }) => sum + rates.length, 1);
    return count * this.manifest.weights.bytes <= MEMORY;
  }

  /** Run a graph on an image [3, H, W]. */
  run(graph: Graph, image: Float32Array): Promise<Answer> {
    const next = this.last.then(() => this.now(graph, image));
    this.last = next.catch(() => undefined);
    return next;
  }

  private async now(graph: Graph, image: Float32Array): Promise<Answer> {
    const session = await this.session(graph.graph);
    const input = new this.ort.Tensor("float32", image, [1, 3, ...this.manifest.image]);
    const start = performance.now();
    const found = await session.run({ [session.inputNames[0]]: input });
    const milliseconds = performance.now() - start;
    const outputs = session.outputNames.map((name) => found[name].data);
    const answers = this.manifest.head ? 2 : 1;
    return {
      features: outputs[0] as Float32Array,
      logits: this.manifest.head ? (outputs[1] as Float32Array) : null,
      maps: outputs.slice(answers) as Int32Array[],
      milliseconds,
    };
  }

  /** Return the session of a graph; the ones used longest ago are closed when too much memory is held. */
  private async session(file: string): Promise<Ort.InferenceSession> {
    const known = this.sessions.get(file) ?? this.create(file);
    this.sessions.delete(file);
    this.sessions.set(file, known);
    const most = Math.max(3, Math.floor(MEMORY / this.manifest.weights.bytes));
    for (const [name, session] of [...this.sessions].slice(0, -most)) {
      if (name === this.manifest.unreduced.graph) continue; // every picture needs it
      this.sessions.delete(name);
      await (await session).release();
    }
    return known;
  }

  private async create(file: string): Promise<Ort.InferenceSession> {
    const externalData = [{ path: this.manifest.weights.file, data: this.weights }];
    return this.ort.InferenceSession.create(await bytes(file, true), { ...OPTIONS, externalData });
  }
}
