"""A page that continues text in the browser with an artifact: nothing that is written there leaves the machine."""
