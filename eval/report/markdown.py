"""Write report.md and the table on the terminal."""

from __future__ import annotations

from cuantiza.core.machine.terminal import new_table, show
from cuantiza.core.pages import escape, number, table
from cuantiza.eval.report.columns import COLUMNS, MAIN, cells, protocols_of, shape_title, titles
from cuantiza.eval.report.conclusion import conclusion
from cuantiza.eval.report.schema import Report, Row
from cuantiza.eval.report.wording import LABELS, METHOD


def print_table(report: Report, language: str = "en") -> None:
    """Print the table on standard output."""
    first, labels = report.baseline, LABELS[language]
    facts = {"cpu": report.machine.cpu, "threads": report.machine.threads, "rounds": report.rounds, "first": first.name}
    caption = labels["caption"].format(**facts, onnxruntime=report.versions.get("onnxruntime", "?"))
    grid = new_table(f"{report.model}: {summary(report, language)}", *titles(MAIN, first, language), caption=caption)
    for row in report.artifacts:
        grid.add_row(*cells(MAIN, row, first, language))
    show(grid)


def markdown(report: Report, language: str = "en") -> str:
    """The text of report.md in `language`."""
    rows, labels = report.artifacts, LABELS[language]
    heads, lines = timings(report, language)
    shapes = table(heads, [[escape(cell) for cell in line] for line in lines])
    prompt = escape(report.prompt)
    parts = [
        f"# {escape(report.model)}",
        escape(summary(report, language)),
        f"## {labels['conclusion']}",
        "\n".join(f"- {line}" for line in conclusion(report, language)),
        f"## {labels['artifacts']}",
        _table(report, MAIN, language),
        *(f"- {escape(line)}" for line in left_out(report, language)),
        f"## {labels['protocols']}",
        " ".join(protocols(report, language)),
        _table(report, protocols_of(report.baseline), language),
        f"## {labels['shapes']}",
        labels["shapes_note"],
        shapes.rstrip(),
        f"## {labels['texts']}",
        labels["texts_same"],
        "\n".join(f"- **{escape(row.name)}**: {prompt}{escape(row.continuation)}" for row in rows),
        *(_modules(row, language) for row in rows if row.is_torch),
        f"## {labels['method']}",
        *method(report, language),
        f"## {labels['environment']}",
        "\n".join(f"- {term}: {escape(value)}" for term, value in surroundings(report, language)),
    ]
    return "\n\n".join(parts) + "\n"


def _table(report: Report, keys: tuple[str, ...], language: str) -> str:
    first = report.baseline
    lines = [[escape(cell) for cell in cells(keys, row, first, language)] for row in report.artifacts]
    return table(titles(keys, first, language), lines).rstrip()


def timings(report: Report, language: str) -> tuple[list[str], list[list[str]]]:
    """The table of all latencies, (titles, rows): median / 90th percentile in ms of every shape of every row."""
    first = report.baseline
    heads = [
        COLUMNS["name"].title(first, language),
        *(shape_title("prefill", item.at, language) for item in first.prefill),
        *(shape_title("decode", item.at, language) for item in first.decode),
    ]
    lines = [
        [row.name, *(f"{number(item.p50_ms, 2, language)} / {number(item.p90_ms, 2, language)}" for item in shapes)]
        for row in report.artifacts
        for shapes in [(*row.prefill, *row.decode)]
    ]
    return heads, lines


def _modules(row: Row, language: str) -> str:
    some, total = (number(value or 0, 0, language) for value in (row.modules_quantized, row.modules_with_weights))
    return LABELS[language]["modules"].format(name=row.name, some=some, all=total)


def summary(report: Report, language: str) -> str:
    """Say in one line which text was scored."""
    corpus, labels = report.corpus, LABELS[language]
    return (
        f"{number(report.baseline.tokens_scored, 0, language)} {labels['tokens_scored']} · "
        f"{number(corpus.documents, 0, language)} {labels['of']} {number(corpus.documents_in_split, 0, language)} "
        f"{labels['documents']} ({_split(report, language)}) · {corpus.source}"
        + (f" ({labels['by_' + corpus.by]})" if corpus.by != "document" else "")
        + (f" ({labels['joined']})" if corpus.joined else "")
    )


def _split(report: Report, language: str) -> str:
    """The name of the split in `language`."""
    split = report.corpus.split
    return LABELS[language]["test"] if split == "test" else split


def protocols(report: Report, language: str) -> list[str]:
    """Say how the perplexities in the table of other protocols are computed, and what the last words are."""
    labels, llama = LABELS[language], report.baseline.llama_cpp
    notes = [labels["protocols_note"].format(documents=report.corpus.documents, window=report.corpus.window_tokens)]
    if llama is None:
        notes.append(labels["llama_short"].format(window=report.corpus.window_tokens))
    else:
        scored = number(llama.tokens_scored, 0, language)
        notes.append(labels["llama_note"].format(windows=llama.windows, window=llama.window_tokens, scored=scored))
    measured = [item.name for item in report.baseline.protocols]
    notes += [labels["paper_short"].format(name=name) for name in report.inputs.protocols if name not in measured]
    for item in report.baseline.protocols:
        facts = {
            "windows": number(item.windows, 0, language),
            "window": item.window_tokens,
            "stride": item.stride_tokens,
        }
        scored = number(item.tokens_scored, 0, language)
        notes.append(labels[f"{item.name}_note"].format(**facts, scored=scored, first=report.baseline.name))
    if words := report.baseline.last_words:
        notes.append(labels["words_note"].format(words=number(words.words, 0, language), first=report.baseline.name))
    return notes


def left_out(report: Report, language: str) -> list[str]:
    """Say which rows are missing, and why."""
    return [LABELS[language]["left_out"].format(name=item.name, reason=item.reason) for item in report.left_out]


def method(report: Report, language: str) -> list[str]:
    """Say how the figures were measured. Each item is a paragraph."""
    facts = {"window": report.corpus.window_tokens, "first": report.baseline.name, "rounds": report.rounds}
    return [line.format(**facts, threads=report.machine.threads) for line in METHOD[language]]


def surroundings(report: Report, language: str) -> list[tuple[str, str]]:
    """List the machine, the text and the versions as pairs (term, value)."""
    options = next((row.session_options for row in report.artifacts if row.session_options), {})
    machine, corpus, labels = report.machine, report.corpus, LABELS[language]
    threads = f"{machine.threads} {labels['of']} {machine.processors}"
    if machine.processors_limit is not None:
        threads += labels["limited"].format(limit=number(machine.processors_limit, 1, language))
    memory = f"{number(machine.memory_bytes / 2**30, 0, language)} GiB"
    if machine.memory_limit_bytes is not None:
        memory += labels["limited"].format(limit=f"{number(machine.memory_limit_bytes / 2**30, 1, language)} GiB")
    return [
        (labels["processor"], machine.cpu),
        (labels["instructions"], ", ".join(machine.instructions) or labels["unknown"]),
        (labels["threads"], threads),
        (labels["memory"], memory),
        (labels["system"], machine.system),
        (labels["session"], ", ".join(f"{name} {value}" for name, value in options.items()) or labels["unknown"]),
        (labels["rounds"], str(report.rounds)),
        (labels["corpus"], f"{corpus.source} ({_split(report, language)}, sha256 {corpus.sha256})"),
        (labels["versions"], ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
