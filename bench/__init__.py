"""Our artifacts and what users would pick instead, measured side by side. Imports core and core.machine; torch in peers alone."""
