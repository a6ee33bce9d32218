"""Our artifacts and what users would pick instead, measured side by side. Imports core and eval.machine; torch in peers alone."""
