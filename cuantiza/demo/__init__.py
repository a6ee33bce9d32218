"""A web page that continues text with an artifact. It runs in the browser, so the text never leaves the machine."""
