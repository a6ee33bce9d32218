"""Make the PyTorch model of a checkpoint: the reference of an export, and the baseline of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import base_folder
from cuantiza.core.inputs.gpt2_config import canonical_fields, is_gpt2
from cuantiza.core.inputs.weights.adapters import read_adapter, read_fields
from cuantiza.core.inputs.weights.checkpoint import index_is_bare, read_checkpoint, read_merged
from cuantiza.core.inputs.weights.files import Weight


def pytorch_loader(
    folder: Path, attention: str | None = None, advice: str = "", config: Path | None = None
) -> Callable[[], Any]:
    """Return a function that loads the transformers model of the checkpoint in `folder`, in float32.

    transformers reads the files itself wherever it reads them right, so that a comparison with it also checks our
    reading. Only where files had to be repaired or an adapter was merged (`Checkpoint.repaired`) does it get our arrays.
    `attention` is transformers' attn_implementation. `config` is a folder with a repaired config.json, for a model that
    is no GPT-2, where transformers may not load that of `folder`; a GPT-2's is repaired here. Raises UserError as
    `read_checkpoint` does; so does the function that is returned, with `advice` at the end, where transformers cannot
    load the model.
    """
    import torch

    call_once_alone()
    transformers: Any = import_module("transformers")  # its annotations do not hold for what is called here
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"dtype": torch.float32, "attn_implementation": attention}
    local = {"local_files_only": True, "trust_remote_code": False}
    given = read_fields(folder)
    fields = canonical_fields(given)

    def filled(family: Any, config: Any, weights: Mapping[str, Weight], ignored: str | None = None) -> Any:
        """The model of class `family` with `weights`, which are named as transformers names them.

        What transformers finds of the kind `ignored`, such as unexpected_keys, is no error.
        """
        state = {name: torch.from_numpy(weight.read().copy()) for name, weight in weights.items()}
        model, found = family.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options
        )
        if odd := {key: names for key, names in found.items() if names and key != ignored}:
            raise ValueError(f"its config.json does not fit its weights: {odd}")
        return model.eval()

    if not is_gpt2(fields):

        def load_other() -> Any:
            configuration = transformers.AutoConfig.from_pretrained(config or base_folder(folder), **local)
            family = transformers.AutoModelForCausalLM
            if read_adapter(folder) is None and not index_is_bare(folder):
                return family.from_pretrained(folder, config=configuration, **options, **local).eval()
            weights, adapter = read_merged(folder, given)
            if adapter is not None:
                configuration.vocab_size = given["vocab_size"]
                configuration.tie_word_embeddings = "lm_head.weight" not in weights
            # A value head, or another tensor that the model does not read, is left out as it is without an adapter.
            return filled(family._model_mapping[type(configuration)], configuration, weights, "unexpected_keys")

        return _explained(load_other, folder, advice)
    gpt2, checkpoint = transformers.GPT2LMHeadModel, read_checkpoint(folder)

    def load_as_it_is() -> Any:
        mended = {"config": transformers.GPT2Config.from_dict(fields)} if fields != given else {}
        return gpt2.from_pretrained(folder, **mended, **options, **local).eval()

    if not checkpoint.repaired:
        return _explained(load_as_it_is, folder, advice)

    def assemble() -> Any:
        tied = "lm_head.weight" not in checkpoint.weights
        config = transformers.GPT2Config.from_dict(fields | {"tie_word_embeddings": tied})
        weights = {
            name if name.startswith("lm_head.") else f"transformer.{name}": weight
            for name, weight in checkpoint.weights.items()
        }
        return filled(gpt2, config, weights)

    return _explained(assemble, folder, advice)


def call_once_alone() -> None:
    """Call the functions that PyTorch leaves to MKL once in this thread alone, so that later results are exact.

    On Intel's processors MKL chooses a function's kernel at its first call. Where two threads make that call at once, one
    of them may compute its part with a kernel of low precision (https://github.com/pytorch/pytorch/issues/188792). In one
    of some thousand exports of a tiny model, logits were off by 2e-4 in place of 3e-6, and parity refused the model.
    """
    import torch

    one = torch.ones(1)
    for name in ("cos", "erf", "erfc", "exp", "expm1", "log", "log10", "log1p", "log2", "sin", "sqrt", "tan", "tanh"):
        getattr(torch, name)(one)


def _explained(load: Callable[[], Any], folder: Path, advice: str) -> Callable[[], Any]:
    def call() -> Any:
        try:
            return load()
        except Exception as error:  # for files that it cannot read, transformers raises many kinds of exception
            raise UserError(f"{folder}: transformers cannot load it ({error}){advice}") from None

    return call
