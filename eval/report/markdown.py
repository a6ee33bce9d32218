"""The report: report.json (schema in docs/report.md), report.md and the table on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cuantiza.core.machine.terminal import new_table, show
from cuantiza.eval.report.conclusion import conclusion
from cuantiza.eval.report.wording import LABELS


@dataclass(frozen=True)
class Column:
    """A column of the table: its title and how it shows a row of the report."""

    title: str
    show: Callable[[dict], str]


def _megabytes(row: dict) -> str:
    return f"{row['bytes'] / 1e6:.1f}"


def _plus_minus(value: float, stderr: float | None, digits: int) -> str:
    value = round(value, digits) + 0.0  # no -0.0000
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _shape(row: dict, phase: str, key: str, preferred: int) -> dict:
    shapes = row[phase]
    return next((shape for shape in shapes if shape[key] == preferred), shapes[-1])


def _columns(report: dict) -> list[Column]:
    first = report["artifacts"][0]
    tokens = _shape(first, "prefill", "tokens", 512)["tokens"]
    position = _shape(first, "decode", "position", 128)["position"]

    def latency(phase: str, key: str, at: int):
        def show(row: dict) -> str:
            shape = _shape(row, phase, key, at)
            return f"{shape['p50_ms']:.2f} ({shape['speedup']:.2f} ×)"

        return show

    return [
        Column("artifact", lambda row: row["name"]),
        Column("MB", _megabytes),
        Column("× fp32", lambda row: f"{row['bytes'] / first['bytes']:.3f}"),
        Column("perplexity", lambda row: _plus_minus(row["perplexity"], row["perplexity_stderr"], 2)),
        Column(
            "Δ ln ppl",
            lambda row: "baseline" if row is first else _plus_minus(row["delta_ln_ppl"], row["delta_ln_ppl_stderr"], 4),
        ),
        Column("KL, nats", lambda row: "" if row is first else f"{row['kl_divergence']:.5f}"),
        Column("same top", lambda row: "" if row is first else f"{100 * row['top1_agreement']:.1f} %"),
        Column("bits/byte", lambda row: f"{row['bits_per_byte']:.4f}"),
        Column(f"prefill {tokens}, ms", latency("prefill", "tokens", tokens)),
        Column(f"decode @{position}, ms", latency("decode", "position", position)),
        Column("load, ms", lambda row: f"{row['load_ms']:.0f}"),
        Column("peak MB", lambda row: f"{row['peak_rss_bytes'] / 1e6:.0f}"),
    ]


def print_table(report: dict) -> None:
    """The table on standard output."""
    columns = _columns(report)
    table = new_table(_headline(report), *(column.title for column in columns), caption=_footnote(report))
    for row in report["artifacts"]:
        table.add_row(*(column.show(row) for column in columns))
    show(table)


def markdown(report: dict, language: str = "en") -> str:
    """report.md; its conclusion in `language`."""
    columns, rows = _columns(report), report["artifacts"]
    lines = [
        f"# {_headline(report)}",
        "",
        _footnote(report),
        "",
        f"## {LABELS[language]['conclusion']}",
        "",
        *(f"- {line}" for line in conclusion(report, language)),
        "",
        f"## {LABELS[language]['artifacts']}",
        "",
        "| " + " | ".join(column.title for column in columns) + " |",
        "|---|" + "---:|" * (len(columns) - 1),
    ]
    lines += ["| " + " | ".join(column.show(row) for column in columns) + " |" for row in rows]
    lines += [
        "",
        "## Other protocols",
        "",
        _protocols_note(report),
        "",
        "| artifact | llama.cpp perplexity | word perplexity | byte perplexity |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        llama = row["llama_cpp"]
        lines.append(
            f"| {row['name']} | {_plus_minus(llama['perplexity'], llama['perplexity_stderr'], 2) if llama else '—'} "
            f"| {row['word_perplexity']:.2f} | {row['byte_perplexity']:.4f} |"
        )
    lines += ["", "## Latency", "", "Milliseconds, p50 / p90; batch of 1.", ""]
    shapes = [("prefill", "tokens", item["tokens"]) for item in rows[0]["prefill"]] + [
        ("decode", "position", item["position"]) for item in rows[0]["decode"]
    ]
    lines += [
        "| artifact | "
        + " | ".join(f"{phase} {'@' if phase == 'decode' else ''}{at}" for phase, _, at in shapes)
        + " |",
        "|---|" + "---:|" * len(shapes),
    ]
    for row in rows:
        cells = [next(item for item in row[phase] if item[key] == at) for phase, key, at in shapes]
        lines.append(
            f"| {row['name']} | " + " | ".join(f"{cell['p50_ms']:.2f} / {cell['p90_ms']:.2f}" for cell in cells) + " |"
        )
    lines += [
        "",
        f"## «{report['prompt']}», continued",
        "",
        "Greedy; the same tokens in every row mean the same argmax at every step.",
        "",
    ]
    lines += [f"- **{row['name']}**: {report['prompt']}{row['continuation']}".replace("\n", " ") for row in rows]
    for row in rows:
        if "modules_quantized" in row:
            lines += [
                "",
                f"`{row['name']}`: PyTorch quantized {row['modules_quantized']} of {row['modules_with_weights']} modules with weights.",
            ]
    return "\n".join(lines) + "\n"


def _headline(report: dict) -> str:
    corpus = report["corpus"]
    tokens = report["artifacts"][0]["tokens_scored"]
    return f"{report['model']}: {tokens} tokens, {corpus['documents']} of {corpus['documents_in_split']} test documents of {corpus['source']}"


def _footnote(report: dict) -> str:
    machine = report["machine"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, onnxruntime {report['versions']['onnxruntime']}, {report['rounds']} interleaved rounds; "
        f"times are p50, in brackets the speed-up over {report['artifacts'][0]['name']} (median of rounds); "
        "± is one standard error over documents; Δ and KL are paired with the baseline."
    )


def _protocols_note(report: dict) -> str:
    first, corpus = report["artifacts"][0], report["corpus"]
    llama = first["llama_cpp"]
    note = (
        f"The table above follows lm-evaluation-harness: {corpus['documents']} documents, each behind one start token, windows of at most "
        f"{corpus['window_tokens']} tokens, every token scored once, a last window extended to the left; words are split at white space."
    )
    if llama:
        note += (
            f" llama.cpp: the documents joined by an empty line, {llama['windows']} disjoint windows of {llama['window_tokens']} tokens without a start token, "
            f"{llama['tokens_scored']} tokens scored, the second half of each window."
        )
    return note
