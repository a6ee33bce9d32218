// The page: shows its texts, sends requests to the worker, and displays what the worker reports.

import { TEXTS } from "./texts.js";

const element = (id) => document.getElementById(id);
const DASH = "–";
const FIELDS = ["prompt", "length", "temperature", "topK", "seed"];
const KEPT = `cuantiza-demo ${location.pathname}`;
const [LINES, CHARACTERS] = [6, 300]; // of the prompt, in front of the continuation

// (module (func (result v128) i32.const 0 i8x16.splat)), which is only valid if the browser supports SIMD.
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11];

let language = (navigator.languages ?? [navigator.language])[0]?.startsWith("es") ? "es" : "en";
let about = null; // demo.json
let worker = null;
let threads = null;
// The messages that are shown now. They are kept so that they can be shown again when the language changes.
const shown = { running: false, ready: false, progress: null, report: null, status: null, problem: null };

const megabytes = (bytes) => number(bytes / 1e6, 1);

function number(value, digits = 0) {
  const options = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return new Intl.NumberFormat(language, options).format(value);
}

function show() {
  const texts = TEXTS[language];
  document.documentElement.lang = language;
  document.title = texts.title;
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = texts[node.dataset.text];
  for (const node of document.querySelectorAll("[data-label]")) node.ariaLabel = texts[node.dataset.label];
  for (const node of document.querySelectorAll("[data-language]")) {
    node.ariaPressed = String(node.dataset.language === language);
  }
  showSettings();
  showState();
}

function showSettings() {
  for (const output of document.querySelectorAll("output")) {
    const input = element(output.htmlFor.value);
    output.textContent = number(input.valueAsNumber, input.id === "temperature" ? 2 : 0);
  }
}

function showState() {
  const texts = TEXTS[language];
  const { running, ready, progress, report, status, problem } = shown;
  // A button that is hidden loses the focus: the one in its place takes it.
  const [shownNow, hiddenNow] = running ? [element("stop"), element("go")] : [element("go"), element("stop")];
  const focused = document.activeElement === hiddenNow;
  shownNow.hidden = false;
  hiddenNow.hidden = true;
  if (focused) shownNow.focus({ preventScroll: true });
  const sizes = about && [about.bytes.model, about.bytes.runtime].map(megabytes);
  element("note").textContent = sizes && !ready && !running && !problem ? texts.beforehand(...sizes) : "";
  element("download").hidden = !progress;
  if (progress) {
    const { loaded, total } = progress;
    element("progress").value = loaded / total;
    element("amount").textContent =
      loaded >= total ? texts.starting : texts.amount(megabytes(loaded), megabytes(total));
  }
  element("alert").hidden = !problem;
  element("alert").textContent = problem ? problem(texts) : "";
  element("status").textContent = status ? status(texts) : "";
  element("text").ariaBusy = String(running && ready);
  element("empty").hidden = Boolean(report);
  element("written").textContent = report?.text ?? "";
  const speed = report?.perSecond;
  element("per-second").textContent = speed ? number(speed, speed < 100 ? 1 : 0) : DASH;
  element("first").textContent = report?.first == null ? DASH : number(report.first);
  element("tokens").textContent = report?.tokens ? number(report.tokens) : DASH;
  element("about").textContent = about ? texts.about(about.model, about.recipe, threads) : "";
}

function update(changes) {
  Object.assign(shown, changes);
  showState();
}

function start() {
  worker ??= makeWorker();
  const prompt = element("prompt").value;
  element("given").textContent = ending(prompt);
  update({
    running: true,
    report: { text: "", tokens: 0, first: null, perSecond: null },
    status: shown.ready ? (texts) => texts.writing : null,
    problem: null,
  });
  worker.postMessage({
    type: "generate",
    threads: threadsHere(),
    prompt,
    length: element("length").valueAsNumber,
    temperature: element("temperature").valueAsNumber,
    topK: element("topK").valueAsNumber,
    seed: element("seed").valueAsNumber,
  });
  element("text").scrollIntoView({ block: "nearest" });
}

/** The end of a prompt, which is what the continuation continues: a long one would push it out of sight. */
function ending(prompt) {
  const lines = prompt.split("\n").slice(-LINES).join("\n");
  const end = [...lines].slice(-CHARACTERS).join("");
  if (end === prompt) return prompt;
  return "…" + (end === lines ? end : end.replace(/^\S*(?=\s)/, "")); // the first word may have lost its beginning
}

/** Keep what the page was told, for when it is loaded again in this tab. */
function remember() {
  const values = Object.fromEntries(FIELDS.map((name) => [name, element(name).value]));
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ language, values }));
  } catch {
    // A browser may forbid it, and has little room; the page works without.
  }
}

function recall() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEPT));
    if (kept.language in TEXTS) language = kept.language;
    for (const name of FIELDS) if (typeof kept.values[name] === "string") element(name).value = kept.values[name];
  } catch {
    // Nothing is kept, or not by this page.
  }
}

/** The number of threads: half of the processors, at most 4. The other half often shares the arithmetic units of the
 * first. Without the headers for shared memory it is 1. */
function threadsHere() {
  return crossOriginIsolated ? Math.min(4, Math.ceil((navigator.hardwareConcurrency || 1) / 2)) : 1;
}

function makeWorker() {
  const made = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  made.onmessage = ({ data }) => heard[data.type](data);
  made.onerror = (event) => heard.failed({ detail: event.message || "worker.js" });
  return made;
}

const heard = {
  progress: ({ loaded, total }) => update({ progress: { loaded, total } }),
  ready: (data) => {
    threads = data.threads;
    update({ ready: true, progress: null, status: (texts) => texts.writing });
  },
  text: (report) => update({ report }),
  done: (report) => {
    const { reason, dropped } = report;
    const end = { length: "length_reached", end: "end_reached", stopped: "stopped" }[reason];
    const status = (texts) => texts[end] + (dropped ? texts.dropped(number(dropped)) : "");
    update({ report, running: false, status });
  },
  failed: ({ detail }) => {
    worker.terminate();
    worker = null; // the next try begins anew
    const problem = (texts) => texts.failed(detail);
    update({ running: false, ready: false, progress: null, report: null, status: null, problem });
    element("given").textContent = "";
  },
};

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
element("settings").addEventListener("input", showSettings);
document.addEventListener("input", remember);
// A field with an invalid value must be visible.
element("settings").addEventListener("invalid", () => (element("settings").open = true), true);
element("stop").addEventListener("click", () => worker.postMessage({ type: "stop" }));
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !shown.running) element("form").requestSubmit();
});
for (const button of document.querySelectorAll(".examples button")) {
  button.addEventListener("click", () => {
    element("prompt").value = button.textContent;
    element("prompt").focus();
    remember();
  });
}
for (const button of document.querySelectorAll("[data-language]")) {
  button.addEventListener("click", () => {
    language = button.dataset.language;
    remember();
    show();
  });
}

// On a phone the open settings would push the text off the screen.
element("settings").open = matchMedia("(min-width: 56rem)").matches;
recall();
show();
if (typeof WebAssembly === "undefined" || !WebAssembly.validate(new Uint8Array(SIMD))) {
  element("go").disabled = true;
  update({ problem: (texts) => texts.noSimd });
} else {
  try {
    const response = await fetch(new URL("demo.json", import.meta.url));
    if (!response.ok) throw new Error(`demo.json: HTTP ${response.status}`);
    about = await response.json();
    showState();
  } catch (error) {
    update({ problem: (texts) => texts.failed(error.message) });
  }
}
