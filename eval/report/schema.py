"""report.json as typed classes: every field with its meaning and its unit.

The tables in docs/report.md are made from the descriptions here, by `python -m lab.report_page`. A change that breaks
readers needs another SCHEMA. A new field with a default does not: reports written before it can still be read.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, FailFast, Field

from cuantiza.core.store import digests

SCHEMA: Final = "cuantiza/report/1"
# Protocols of papers, by which perplexity is measured on request (eval/measure/tokens/protocols.py).
PaperName = Literal["transformers", "gptq"]
PAPER_NAMES: tuple[PaperName, ...] = get_args(PaperName)
# Why PyTorch's int8 has no row on some machines, as the row's reason says.
NO_KERNELS: Final = "has no int8 kernels on this machine"
PREFILL, DECODE = 512, 128  # tokens: the lengths that tables and conclusions show
# The upper bound is far above any real figure, and small enough that sums and squares of floats do not overflow.
Count = Annotated[int, Field(gt=0, le=10**15)]
Positive = Annotated[float, Field(gt=0)]


class Part(BaseModel):
    """A part of the report. Values cannot be reassigned, and unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")


class Timing(Part):
    """The latency of one shape: of a prefill of `at` tokens, or of a decode step at position `at`."""

    at: int
    p50_ms: Positive = Field(description="median of all samples, ms")
    p90_ms: Positive = Field(description="90th percentile of all samples, ms")
    tokens_per_second: Positive = Field(description="tokens per second at the median")
    speedup: Positive = Field(
        description="the baseline's median over this row's within one round (no unit): the median of the rounds"
    )
    speedup_min: Positive = Field(description="the smallest of these ratios")
    speedup_max: Positive = Field(description="the largest of these ratios")
    samples_per_round: tuple[Count, ...] = Field(description="number of samples in each round")
    samples_ns: Annotated[tuple[Count, ...], FailFast()] = Field(
        description="raw samples in ns, in the order they were taken, one round after the other"
    )


class Prefill(Timing):
    """A prefill: so many tokens through an empty cache, to the logits of the last one, as generation begins."""

    at: Count = Field(alias="tokens", description="tokens of the prefill")


class Decode(Timing):
    """A decode step: one token after a cache of so many."""

    at: Annotated[int, Field(ge=0)] = Field(alias="position", description="tokens in the cache before the step")


class LlamaCpp(Part):
    """Perplexity by llama.cpp's protocol."""

    perplexity: float = Field(description="exp of the mean negative log-likelihood over the scored halves")
    perplexity_stderr: float | None = Field(
        description="its uncertainty as llama.cpp's own tool prints it: the standard error over single tokens, as if they "
        "were independent. It is smaller than one over documents; older reports have windows as the unit"
    )
    windows: Count = Field(description="number of windows")
    window_tokens: Count = Field(description="tokens in a window")
    tokens_scored: Count = Field(description="tokens in the second halves of all windows")


class Protocol(Part):
    """Perplexity by the protocol of a paper."""

    name: PaperName = Field(
        description="`transformers`: windows that overlap by half, as in its documentation on perplexity; `gptq`: full "
        "windows one after the other, as in GPTQ's code"
    )
    perplexity: float = Field(description="exp of the mean negative log-likelihood over the scored tokens")
    perplexity_stderr: float | None = Field(
        description="its standard error, with windows as the sampling unit; null for a single window"
    )
    delta_ln_ppl: float = Field(
        description="mean over tokens of (negative log-likelihood − the baseline's), nats; exp of it − 1 is the relative rise "
        "of perplexity that papers print"
    )
    delta_ln_ppl_stderr: float | None = Field(description="its own standard error over windows, nats")
    windows: Count = Field(description="number of windows")
    window_tokens: Count = Field(description="tokens in a full window: the model's length, at most 2048")
    stride_tokens: Count = Field(description="tokens from the beginning of one window to that of the next")
    tokens_scored: Count = Field(description="tokens with a negative log-likelihood")


class LastWords(Part):
    """How many last words of sentences are answered, and what flipped against the baseline."""

    words: Count = Field(description="words that were asked for, 5,000 at most")
    accuracy: Annotated[float, Field(ge=0, le=1)] = Field(
        description="share of the words whose every token was the likeliest one, 0 to 1"
    )
    accuracy_stderr: float | None = Field(description="its standard error over documents; null for a single document")
    gained: Annotated[int, Field(ge=0)] = Field(description="words that the baseline misses and this row has right")
    lost: Annotated[int, Field(ge=0)] = Field(description="words that the baseline has right and this row misses")
    p: Annotated[float, Field(ge=0, le=1)] = Field(
        description="McNemar's exact test, two-sided: the probability of flips at least as uneven as these if each goes "
        "either way with probability ½; 1 without flips"
    )
    right: str = Field(
        pattern="^[01]*$",
        description="a character for each word in the order of the text, 1 where it is right: two reports on the same "
        "tokens are paired by it",
    )


class Measured(Part):
    """What is measured for an artifact beside its baseline, in a report and in a sweep: size, quality, latency."""

    name: str = Field(description="recipe, name of a foreign file, `torch-fp32` or `torch-dynamic`")
    bytes: Count = Field(
        description="all files that inference needs: graph, external data, configuration, tokenizer; PyTorch: the "
        "saved state dict instead of the graph"
    )
    model_bytes: Count = Field(description="the graph and its external data (the state dict) alone")
    tokens_scored: Count = Field(description="tokens with a negative log-likelihood")
    perplexity: float = Field(
        description="exp of the mean negative log-likelihood (nats per token), every token of every document once"
    )
    perplexity_stderr: float | None = Field(
        description="its standard error, with documents as the sampling unit; null for a single document"
    )
    bits_per_byte: float = Field(
        description="total negative log-likelihood in bits over the UTF-8 bytes: comparable across tokenizers"
    )
    word_perplexity: float = Field(
        description="exp of the total over white-space words, as lm-evaluation-harness defines it"
    )
    byte_perplexity: float = Field(description="exp of the total over bytes, as lm-evaluation-harness defines it")
    delta_ln_ppl: float = Field(
        description="mean over tokens of (negative log-likelihood − the baseline's), nats: the difference of ln "
        "perplexity, paired"
    )
    delta_ln_ppl_stderr: float | None = Field(description="its own standard error over documents, nats")
    kl_divergence: float = Field(description="mean KL(baseline ‖ artifact) over the vocabulary, nats per token")
    kl_divergence_stderr: float | None = Field(description="its standard error over documents, nats")
    kl_divergence_p50: float = Field(description="median over tokens, nats")
    kl_divergence_p99: float = Field(description="99th percentile over tokens, nats")
    top1_agreement: float = Field(
        description="share of positions whose likeliest token is the baseline's likeliest token, 0 to 1"
    )
    top1_agreement_stderr: float | None = Field(description="its standard error over documents")
    nll_by_document: Annotated[tuple[float, ...], FailFast()] = Field(
        description="negative log-likelihood of each document, the sum over its tokens in nats: two reports on the "
        "same tokens are paired by it"
    )
    last_words: LastWords | None = Field(
        None,
        description="how many last words of sentences are answered: see below; null where the text has none to ask for, and "
        "in reports from before this field",
    )
    load_ms: Positive = Field(
        description="median time in ms to open a session from a warm file cache (PyTorch: to load and, for "
        "`torch-dynamic`, to quantize), without imports"
    )
    load_samples_ns: tuple[Count, ...] = Field(description="one sample per round, ns")
    peak_rss_bytes: Count = Field(
        description="largest resident set, in bytes, of a process that did nothing but load and measure this row, its libraries "
        "included"
    )
    session_options: dict[str, str] = Field(
        {},
        description="ONNX Runtime's session options while latency was measured, by its own names (quality is measured in "
        "sessions with `session.force_spinning_stop` at 1); empty for PyTorch rows and in reports from before this field",
    )
    prefill: tuple[Prefill, ...] = Field(min_length=1, description="one element per prefill length: see below")
    decode: tuple[Decode, ...] = Field(
        min_length=1,
        description="one element per position: see below; the last one is the model's last position, or the last of "
        "`--positions`, 1023 where that is not given",
    )

    def usual(self, phase: Literal["prefill", "decode"]) -> Timing:
        """The shape that tables show: prefill of 512 tokens, decode at position 128; else the longest or last one."""
        wanted, shapes = (PREFILL, self.prefill) if phase == "prefill" else (DECODE, self.decode)
        return next((shape for shape in shapes if shape.at == wanted), shapes[-1])


def _kind(fields: dict[str, Any]) -> Literal["onnx", "torch"]:
    """The kind of a row in a report written before rows had one: only PyTorch's rows count modules."""
    return "onnx" if fields.get("modules_with_weights") is None else "torch"


class Row(Measured):
    """A row of the report: an ONNX artifact, or one of PyTorch's models that it is compared with."""

    llama_cpp: LlamaCpp | None = Field(
        description="`perplexity`, `perplexity_stderr`, `windows`, `window_tokens`, `tokens_scored` by llama.cpp's "
        "protocol; null for PyTorch rows and for texts shorter than a window"
    )
    protocols: tuple[Protocol, ...] = Field(
        (),
        exclude_if=lambda value: not value,
        description="one element per protocol that `--protocols` named, see below; left out where there is none",
    )
    key_error: tuple[float, ...] | None = Field(
        None,
        description="for each layer, ‖keys − the baseline's‖ / ‖the baseline's‖ (no unit) over 128 tokens of the "
        "text; null for PyTorch rows and where heads differ from the baseline's",
    )
    continuation: str = Field(description="greedy continuation of the seed prompt")
    modules_with_weights: Count | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="modules that hold a weight; only PyTorch rows have this field",
    )
    modules_quantized: Annotated[int, Field(ge=0)] | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="how many of them `quantize_dynamic` replaced; only PyTorch rows have this field",
    )
    kind: Literal["onnx", "torch"] = Field(
        default_factory=_kind,
        description="`onnx`: an artifact; `torch`: a PyTorch model, measured for comparison. Reports from before this "
        "field are read by whether `modules_with_weights` is there",
    )

    @property
    def is_torch(self) -> bool:
        return self.kind == "torch"


class Corpus(Part):
    """The text that was scored."""

    source: str = Field(description="what `CORPUS=` named")
    by: str = Field(
        "document",
        exclude_if=lambda value: value == "document",
        description="what `CORPUS_BY=` said a document is: `line` or `article`; left out where it is `document`",
    )
    joined: bool = Field(
        False,
        exclude_if=lambda value: not value,
        description="whether `CORPUS_JOIN=1` joined all texts to one document; left out where it did not",
    )
    split: str = Field(description="name of the split")
    sha256: str = Field(description="sha256 of the whole split")
    documents: Count = Field(description="documents scored")
    documents_in_split: Count = Field(description="documents in the whole split")
    bytes: Count = Field(description="UTF-8 bytes of the scored documents")
    words: Count = Field(description="words of the scored documents, split at white space")
    document_tokens: Annotated[tuple[Count, ...], FailFast()] = Field(
        min_length=1, description="tokens of each scored document"
    )
    tokens_sha256: str = Field(description="sha256 of the token ids of all scored documents")
    window_tokens: Count = Field(description="longest context of a scored token, tokens")


class Machine(Part):
    """Where it was measured."""

    cpu: str = Field(description="name of the processor")
    processors: Count = Field(description="logical processors")
    threads: Count = Field(description="threads that every runtime used")
    memory_bytes: Count = Field(description="memory of the machine, bytes")
    system: str = Field(description="operating system")
    processors_limit: Annotated[float, Field(gt=0)] | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="processors' worth of time that a container may use; only where it is limited",
    )
    memory_limit_bytes: Count | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="memory that a container may use, bytes; only where it is limited",
    )

    instructions: tuple[str, ...] = Field(
        (),
        description="instruction sets of the processor that matrix kernels choose between, such as `AVX2`, `AVX-512 VNNI` or "
        "`NEON dotprod`; empty where the system does not tell, and in reports from before this field",
    )


class LeftOut(Part):
    """A row that is not there, because it could not be measured."""

    name: str = Field(description="name of the row")
    kind: Literal["onnx", "torch", "torch-dynamic"] = Field(description="an ONNX file, PyTorch, or PyTorch's int8")
    reason: str = Field(description="what went wrong, in one line")

    @property
    def expected(self) -> bool:
        """Whether this machine cannot measure it: not every build of PyTorch has kernels for int8."""
        return self.kind == "torch-dynamic" and NO_KERNELS in self.reason


class Inputs(Part):
    """Everything that the report depends on."""

    artifacts: tuple[tuple[str, str], ...] = Field(
        description="(name, digest) of each artifact; the first is the baseline"
    )
    onnx: tuple[tuple[str, str], ...] = Field(description="(path, digest) of each foreign file")
    torch: bool = Field(description="whether PyTorch's rows were measured")
    corpus: str = Field(description="sha256 of the split")
    tokens: int = Field(description="`--tokens`")
    window: int = Field(description="`--window`")
    rounds: int = Field(description="`--rounds`")
    protocols: tuple[PaperName, ...] = Field(
        (), exclude_if=lambda value: not value, description="`--protocols`; left out where there is none"
    )
    positions: int = Field(1024, description="`--positions`; reports from before this field have 1024")
    machine: Machine = Field(description="as above")
    code: str = Field(description="sha256 of the code that measures")
    versions: dict[str, str] = Field(description="as above")


class Report(Part):
    """The content of report.json."""

    schema_name: Literal["cuantiza/report/1"] = Field(
        alias="schema", description=f"`{SCHEMA}`; a change that breaks readers changes the number"
    )
    model: str = Field(description="folder name of the model")
    corpus: Corpus = Field(description="the text: see below")
    machine: Machine = Field(description="the machine: see below")
    versions: dict[str, str] = Field(description="versions of Python and of the libraries that measured")
    rounds: Count = Field(description="interleaved rounds of latency")
    prompt: str = Field(description="the seed prompt that every row continues")
    inputs: Inputs = Field(
        description="everything that the report depends on; equal inputs mean that a run has nothing to do"
    )
    artifacts: Annotated[tuple[Row, ...], FailFast()] = Field(
        min_length=1, description="one row each; the first is the baseline of every difference and speed-up"
    )
    left_out: tuple[LeftOut, ...] = Field(
        (), exclude_if=lambda value: not value, description="rows that could not be measured; only where there are any"
    )
    sha256: str = Field("", description="sha256 of everything here but this and `pages`, as JSON with sorted keys")
    pages: dict[str, str] = Field(
        {}, description="sha256 of the `report.md` and `report.html` that belong to this file"
    )

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """The report in `text`. Raises pydantic's ValidationError, a ValueError, where it has another schema."""
        return cls.model_validate_json(text, strict=True)

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False) + "\n"

    def digest(self) -> str:
        """sha256 of what was measured. A report where it is not `sha256` is damaged, and must not be shown again."""
        return digests.digest(self.model_dump(mode="json", by_alias=True, exclude={"sha256", "pages"}))

    def sealed(self, pages: dict[str, str]) -> Report:
        """This report with its own sha256, and that of each of its pages."""
        return self.model_copy(update={"sha256": self.digest(), "pages": pages})

    @property
    def baseline(self) -> Row:
        return self.artifacts[0]
