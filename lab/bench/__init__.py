"""Our artifacts and what users would pick instead, measured side by side. Imports core and cuantiza.core.machine.hardware; torch in peers alone."""
