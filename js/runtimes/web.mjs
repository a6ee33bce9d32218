// Runs a job in onnxruntime-web (WebAssembly), in a real Chromium without a window: `node js/runtimes/web.mjs job.json`.

import { createReadStream, existsSync } from "node:fs";
import { createServer } from "node:http";
import { basename, extname, join } from "node:path";
import { launch } from "../browser.mjs";
import { JS, MODULES, runtime, version } from "./common.mjs";

const TYPES = {
  ".html": "text/html",
  ".mjs": "text/javascript",
  ".wasm": "application/wasm",
  ".json": "application/json",
};
// Together the two headers make a page "cross-origin isolated". Only such a page may share memory between threads.
const ISOLATED = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };
const NO_LOOP = "onnxruntime-web runs graphs; it has no generation loop or tokenizer";

function fileOf(path, job) {
  if (path === "/") return join(JS, "runtimes", "web.html");
  if (path === "/model.onnx") return join(job.folder, "model.onnx");
  if (path === "/causal_lm.mjs") return join(JS, "causal_lm.mjs");
  if (path === "/logits.mjs") return join(JS, "runtimes", "logits.mjs");
  if (path.startsWith("/ort/")) return join(MODULES, "onnxruntime-web", "dist", basename(path));
  return null;
}

/** Serve the page and receive its results. `finished` resolves to { whole, cached }, the bytes of two Float32Arrays. */
function serve(job) {
  const found = {};
  let finish;
  const finished = new Promise((resolve, reject) => (finish = { resolve, reject }));
  const server = createServer(async (request, response) => {
    const path = new URL(request.url, "http://localhost").pathname;
    if (request.method === "POST") {
      const parts = [];
      for await (const part of request) parts.push(part);
      const body = Buffer.concat(parts);
      response.writeHead(204).end();
      const name = basename(path);
      if (name === "failed") finish.reject(new Error(body.toString()));
      else if (name === "done") finish.resolve(found);
      else found[name] = new Uint8Array(body); // a copy starts at a multiple of 4 bytes, as Float32Array needs
      return;
    }
    if (path === "/job.json") {
      response.writeHead(200, { "Content-Type": TYPES[".json"], ...ISOLATED }).end(JSON.stringify(job));
      return;
    }
    const file = fileOf(path, job);
    if (!file) {
      response.writeHead(404).end();
      return;
    }
    const stream = createReadStream(file);
    stream.on("open", () => {
      response.writeHead(200, { "Content-Type": TYPES[extname(file)] ?? "application/octet-stream", ...ISOLATED });
      stream.pipe(response);
    });
    stream.on("error", () => response.writeHead(404).end());
  });
  return { server, finished, fail: (error) => finish.reject(error) };
}

await runtime(async (job) => {
  if (existsSync(join(job.folder, "model.onnx.data"))) {
    throw new Error("the weights are more than 2 GB, too large for WebAssembly; use a smaller model");
  }
  const { server, finished, fail } = serve(job);
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  let browser;
  try {
    browser = await launch();
    browser.on("disconnected", () => fail(new Error("Chromium ended before it sent its result")));
    const page = await browser.newPage();
    page.on("error", (error) => fail(error));
    page.on("pageerror", (error) => fail(error));
    await page.goto(`http://127.0.0.1:${server.address().port}/`, { timeout: 0 });
    const found = await finished;
    const chromium = (await browser.version()).replace(/^[^/]*\//, "");
    return {
      version: `onnxruntime-web ${version("onnxruntime-web")} (WebAssembly, Chromium ${chromium})`,
      whole: new Float32Array(found.whole.buffer),
      cached: new Float32Array(found.cached.buffer),
      skipped: { generated: NO_LOOP, prompt_ids: NO_LOOP },
    };
  } finally {
    await browser?.close();
    server.closeAllConnections();
    server.close();
  }
});
