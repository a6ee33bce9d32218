"""The options that a report shows are those of the session itself."""

from __future__ import annotations

import onnxruntime as ort
import pytest

from cuantiza.core.run.exact_int8 import probe
from cuantiza.core.run.runtime import open_session
from cuantiza.core.run.session_options import session_options


@pytest.mark.parametrize(("threads", "spin", "prepack"), [(1, False, True), (2, True, False)])
def test_what_is_set_is_read_back(threads: int, spin: bool, prepack: bool, tmp_path) -> None:
    (tmp_path / "model.onnx").write_bytes(probe())
    found = session_options(open_session(tmp_path / "model.onnx", threads, spin, prepack))
    assert found["intra_op_num_threads"] == str(threads) and found["inter_op_num_threads"] == "1"
    assert found["session.force_spinning_stop"] == str(int(not spin))
    assert found["session.disable_prepacking"] == str(int(not prepack))
    assert found["graph_optimization_level"] == "ORT_ENABLE_ALL" and found["execution_mode"] == "ORT_SEQUENTIAL"
    assert found["enable_cpu_mem_arena"] == "1"


def test_what_nobody_set_is_not_listed() -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.x64quantprecision", "1")
    found = session_options(ort.InferenceSession(probe(), options, providers=["CPUExecutionProvider"]))
    assert found["graph_optimization_level"] == "ORT_DISABLE_ALL" and found["enable_cpu_mem_arena"] == "0"
    assert found["session.x64quantprecision"] == "1" and "session.disable_prepacking" not in found
