// Starts a real Chromium without a window, and controls it through its debugging protocol.

import { accessSync, constants } from "node:fs";
import { delimiter, join } from "node:path";
import puppeteer from "puppeteer-core";

const NAMES = ["chromium", "chromium-browser", "google-chrome"];

/** The path of a Chromium: $CHROME_PATH if it is set, otherwise the first one on PATH. Throws if there is none. */
export function chromePath() {
  const folders = (process.env.PATH ?? "").split(delimiter);
  const places = process.env.CHROME_PATH
    ? [process.env.CHROME_PATH]
    : NAMES.flatMap((name) => folders.map((folder) => join(folder, name)));
  const found = places.find((place) => {
    try {
      accessSync(place, constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
  if (!found) {
    throw new Error(
      process.env.CHROME_PATH
        ? `CHROME_PATH=${process.env.CHROME_PATH}: is not a program; set it to a Chromium's path`
        : "no Chromium on PATH; install one, or set CHROME_PATH to its path",
    );
  }
  return found;
}

/** Start a browser that makes no network requests by itself and has no time limit. */
export function launch() {
  const root = process.getuid?.() === 0;
  return puppeteer.launch({
    executablePath: chromePath(),
    protocolTimeout: 0,
    timeout: 0,
    args: [
      ...(root ? ["--no-sandbox"] : []), // Chromium's sandbox does not work for root
      "--disable-dev-shm-usage", // in containers /dev/shm often has only 64 MB
      "--disable-background-networking",
      "--disable-component-update",
      "--no-first-run",
    ],
  });
}
