// Uses the demo page like a visitor, in a real Chromium: `node js/demo_check.mjs check.json`. The file says what to do:
// { url, language, viewport: { width, height }, dark, noSimd, processors, screenshots: { name: path },
//   runs: [{ prompt, length, temperature, topK, seed, stopAfter }], reload }
// The script prints its observations as JSON. Screenshots can be named start, download, writing (needs a run with
// stopAfter) and end.

import { readFileSync } from "node:fs";
import { launch } from "./browser.mjs";

const check = JSON.parse(readFileSync(process.argv[2]));
const browser = await launch();
const seen = { console: [], requests: [], runs: [] };
try {
  const page = await browser.newPage();
  page.setDefaultTimeout(0);
  page.on("console", (message) => {
    if (["error", "warn"].includes(message.type())) seen.console.push(message.text());
  });
  page.on("pageerror", (error) => seen.console.push(String(error)));
  page.on("request", (request) => seen.requests.push(request.url()));
  await page.setViewport(check.viewport ?? { width: 1280, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: check.dark ? "dark" : "light" }]);
  await page.evaluateOnNewDocument((language) => {
    Object.defineProperty(navigator, "languages", { get: () => [language] });
  }, check.language ?? "es");
  if (check.processors) {
    const devtools = await page.createCDPSession();
    await devtools.send("Emulation.setHardwareConcurrencyOverride", { hardwareConcurrency: check.processors });
  }
  if (check.noSimd) await page.evaluateOnNewDocument(() => (WebAssembly.validate = () => false));

  const text = (selector) => page.$eval(selector, (node) => (node.hidden ? null : node.textContent));
  const shoot = async (name) => {
    if (check.screenshots?.[name]) await page.screenshot({ path: check.screenshots[name], fullPage: true });
  };

  await page.goto(check.url, { waitUntil: "networkidle0", timeout: 0 });
  await shoot("start");
  for (const run of check.runs ?? []) {
    await page.evaluate(({ stopAfter, ...values }) => {
      for (const [name, value] of Object.entries(values)) {
        const field = document.getElementById(name);
        field.value = value;
        field.dispatchEvent(new Event("input", { bubbles: true }));
      }
      window.watcher?.disconnect();
      window.grown = 0;
      window.watcher = new MutationObserver(() => window.grown++);
      window.watcher.observe(document.getElementById("written"), { childList: true });
    }, run);
    await page.click("#go");
    if (check.screenshots?.download) {
      await page.waitForSelector("#download", { visible: true });
      await shoot("download");
      delete check.screenshots.download;
    }
    if (run.stopAfter) {
      const written = (count) => Number(document.getElementById("tokens").textContent) >= count;
      await page.waitForFunction(written, {}, run.stopAfter);
      await shoot("writing");
      await page.click("#stop");
    }
    await page.waitForSelector("#go", { visible: true });
    const focused = await page.evaluate(() => document.activeElement.id);
    const visible = await page.evaluate(() => {
      const at = document.getElementById("written").getClientRects();
      return at.length > 0 && at[0].top >= 0 && at[0].top < window.innerHeight;
    });
    seen.runs.push({
      focused, // which element has the focus at the end
      visible, // whether the first line of the continuation can be seen without scrolling
      given: await text("#given"),
      written: await text("#written"),
      perSecond: await text("#per-second"),
      first: await text("#first"),
      tokens: await text("#tokens"),
      status: await text("#status"),
      alert: await text("#alert"),
      about: await text("#about"),
      settings: await page.$$eval("output", (nodes) => nodes.map((node) => node.textContent)),
      grown: await page.evaluate(() => window.grown), // the number of times that the text changed on the page
    });
  }
  await shoot("end");
  seen.alert = await text("#alert");
  seen.disabled = await page.$eval("#go", (node) => node.disabled);
  seen.title = await page.title();
  seen.isolated = await page.evaluate(() => crossOriginIsolated);
  // If the page is wider than the window, a phone has to scroll sideways.
  seen.overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  seen.unlabelled = await page.evaluate(() =>
    [...document.querySelectorAll("input, textarea, button, progress")]
      .filter((node) => !node.labels?.length && !node.ariaLabel && !node.textContent.trim())
      .map((node) => node.id),
  );
  if (check.reload) {
    await page.reload({ waitUntil: "networkidle0", timeout: 0 });
    seen.reloaded = await page.evaluate(() =>
      Object.fromEntries([...document.querySelectorAll("textarea, input")].map((field) => [field.id, field.value])),
    );
    seen.reloaded.title = await page.title();
  }
  console.log(JSON.stringify(seen));
} finally {
  await browser.close();
}
