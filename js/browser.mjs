// A real Chromium without a window, driven through its own debugging protocol.

import { accessSync, constants } from "node:fs";
import { delimiter, join } from "node:path";
import puppeteer from "puppeteer-core";

const NAMES = ["chromium", "chromium-browser", "google-chrome"];

/** The path of $CHROME_PATH, else of a Chromium on PATH. Throws where there is none. */
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
        ? `CHROME_PATH=${process.env.CHROME_PATH}: is no program; name a Chromium`
        : "no Chromium on PATH; install one, or name it by CHROME_PATH",
    );
  }
  return found;
}

/** A browser that asks nothing of the network by itself, and waits as long as it has to. */
export function launch() {
  const root = process.getuid?.() === 0;
  return puppeteer.launch({
    executablePath: chromePath(),
    protocolTimeout: 0,
    timeout: 0,
    args: [
      ...(root ? ["--no-sandbox"] : []), // Chromium's sandbox refuses to work for root
      "--disable-dev-shm-usage", // containers give /dev/shm 64 MB
      "--disable-background-networking",
      "--disable-component-update",
      "--no-first-run",
    ],
  });
}
