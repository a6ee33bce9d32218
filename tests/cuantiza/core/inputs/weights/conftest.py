"""A tiny model, and folders that hold its weights in another way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers import tiny_gpt2


@pytest.fixture(scope="package")
def model():
    """The model of the fixture `folder`."""
    return tiny_gpt2()


@pytest.fixture
def state(model) -> dict[str, torch.Tensor]:
    """The tensors of `model` as transformers saves them: of the tied pair, the embedding alone."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


@pytest.fixture
def written(folder: Path) -> Callable[..., Path]:
    """`written(state)` replaces the weights in `folder` by safetensors; `written(object, "bin")` by a pytorch_model.bin."""

    def write(state, kind: str = "safetensors") -> Path:
        (folder / "model.safetensors").unlink()
        if kind == "bin":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write
