"""The options of an open ONNX Runtime session, read back from it, as a report shows them."""

from __future__ import annotations

import onnxruntime as ort

from cuantiza.core.run.exact_int8 import EXACT

_FIELDS = ("intra_op_num_threads", "inter_op_num_threads", "execution_mode", "graph_optimization_level")
_SWITCHES = ("enable_cpu_mem_arena", "enable_mem_pattern", "enable_mem_reuse")
# The configuration entries that cuantiza sets (cuantiza/core/run/runtime.py), and the one that decides about spinning.
_ENTRIES = ("session.intra_op.allow_spinning", "session.force_spinning_stop", "session.disable_prepacking", *EXACT)


def session_options(session: ort.InferenceSession) -> dict[str, str]:
    """What is set in `session`, by ONNX Runtime's own names. A configuration entry that nobody set is not listed."""
    options = session.get_session_options()
    found = {name: _shown(getattr(options, name)) for name in (*_FIELDS, *_SWITCHES)}
    for name in _ENTRIES:
        try:
            found[name] = options.get_session_config_entry(name)
        except RuntimeError:  # it is not set
            continue
    return found


def _shown(value: object) -> str:
    """An enumeration by its name alone, a switch as 0 or 1, as configuration entries have them."""
    return str(int(value)) if isinstance(value, bool) else getattr(value, "name", str(value))
