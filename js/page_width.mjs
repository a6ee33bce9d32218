// Prints how wide a page is on a phone: `node js/page_width.mjs file.html 390` prints its scrollWidth in CSS pixels.

import { pathToFileURL } from "node:url";
import { launch } from "./browser.mjs";

const [file, width] = process.argv.slice(2);
const browser = await launch();
try {
  const page = await browser.newPage();
  await page.setViewport({ width: Number(width), height: 800, isMobile: true, hasTouch: true });
  await page.goto(pathToFileURL(file).href);
  console.log(await page.evaluate(() => document.documentElement.scrollWidth));
} finally {
  await browser.close();
}
