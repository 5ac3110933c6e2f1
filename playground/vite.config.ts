import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { defineConfig } from "vite";

/** A digest of all sources: the tests compare it with the first line of a built file, which is committed. */
function digest(): string {
  const hash = createHash("sha256");
  for (const name of readdirSync("src").sort()) hash.update(`${name}\n${readFileSync(`src/${name}`, "utf8")}`);
  return hash.digest("hex").slice(0, 16);
}

// One script for each page, built into the Python package: `vite build --mode report` and `vite build --mode play`.
export default defineConfig(({ mode }) => ({
  build: {
    outDir: `../src/laconic/${mode}/static`,
    emptyOutDir: false,
    lib: { entry: `src/${mode}.ts`, formats: ["iife"], name: "laconic", fileName: () => `${mode}.js` },
  },
  plugins: [
    {
      name: "digest",
      generateBundle(_, bundle) {
        for (const file of Object.values(bundle))
          if (file.type === "chunk") file.code = `// built from playground/src, ${digest()}\n${file.code}`;
      },
    },
  ],
}));
