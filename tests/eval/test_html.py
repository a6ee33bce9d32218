"""The pages of a report: what they conclude, that they hold it, and that nothing in a report can break out of them."""

import copy
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from cuantiza.core.pages import number, percent
from cuantiza.eval.report.colours import contrast
from cuantiza.eval.report.conclusion import conclusion, picks
from cuantiza.eval.report.html import render
from cuantiza.eval.report.markdown import markdown
from cuantiza.eval.report.schema import Report
from cuantiza.eval.report.wording import LABELS, METHOD

from helpers import ROOT, report_fields, report_row

LANGUAGES = ("en", "es")


def shape(key, at, p50, speedup, spread=0.05):
    samples = [int(p50 * 1e6 * factor) for factor in (0.9, 1.0, 1.1)]
    fields = {"p50_ms": p50, "p90_ms": p50 * 1.1, "tokens_per_second": 1e3 / p50, "samples_ns": samples}
    bounds = {"speedup": speedup, "speedup_min": speedup * (1 - spread), "speedup_max": speedup * (1 + spread)}
    return {key: at, **fields, **bounds, "samples_per_round": [3]}


def row(name, size, delta, decode, prefill, kl, **more):
    fields = {
        "bytes": size,
        "model_bytes": size,
        "tokens_scored": 12622,
        "perplexity": 65 * math.exp(delta),
        "delta_ln_ppl": delta,
        "delta_ln_ppl_stderr": 0.001,
        "kl_divergence": kl,
        "top1_agreement": 1 - kl,
        "continuation": f" y el perro de {name}",
        "prefill": [shape("tokens", 512, prefill, 200 / prefill)],
        "decode": [shape("position", at, decode * (1 + at / 1000), 10 / decode) for at in (32, 128, 1023)],
        "key_error": [kl, 2 * kl],
    }
    return report_row(name, **fields | more)


@pytest.fixture
def fields():
    """The content of a report.json, to be changed."""
    torch = {"modules_with_weights": 40, "modules_quantized": 1, "key_error": None}
    rows = [
        row("fp32", 28_700_000, 0.0, 10.0, 200.0, 0.0),
        row("quick", 7_500_000, 0.002, 2.0, 100.0, 0.001),
        row("small", 5_500_000, 0.02, 4.0, 180.0, 0.02),
        row("faithful", 14_000_000, 0.0001, 8.0, 150.0, 0.00001),
        row("broken", 5_000_000, 1.2, 1.0, 50.0, 1.0),
        row("torch-dynamic", 30_800_000, 0.003, 20.0, 400.0, 0.004, **torch),
    ]
    return report_fields(rows, model="modelo")


def test_picks_follow_from_the_figures(fields):
    found = {pick.need: pick for pick in picks(Report.model_validate(fields))}
    names = {need: pick.row.name for need, pick in found.items()}
    # Neither what is ruined nor what is PyTorch's is taken, though it were smaller and faster.
    expected = {"smallest": "small", "decode": "quick", "prefill": "quick", "nearest": "faithful", "all-round": "quick"}
    assert names == expected
    assert not found["decode"].level
    fields["artifacts"][2]["decode"][1] |= {"speedup": 4.8, "speedup_max": 5.2}  # a round in which it was as fast
    assert {pick.need: pick for pick in picks(Report.model_validate(fields))}["decode"].level == ("small",)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_conclusion_says_what_was_measured(fields, language):
    text = "\n".join(conclusion(Report.model_validate(fields), language))
    assert text.count("**") == 12  # five picks and one warning
    assert percent(math.expm1(0.002), 2, language) in text and percent(math.expm1(1.2), 0, language) in text
    assert ("1 of 40" if language == "en" else "1 de 40") in text
    # 0.002 is two standard errors, 0.02 is twenty.
    within = "within the sampling error" if language == "en" else "dentro del error de muestreo"
    lines = text.splitlines()
    quick, small = (next(line for line in lines if f" {name}**" in line) for name in ("quick", "small"))
    assert within in quick and within not in small
    alone = fields | {"artifacts": fields["artifacts"][:1]}
    assert len(conclusion(Report.model_validate(alone), language)) == 1


def test_what_changes_nothing_is_said_to(fields):
    fields["artifacts"][3] |= {"delta_ln_ppl": 0.0, "delta_ln_ppl_stderr": 0.0, "kl_divergence": 0.0}
    assert next(line for line in conclusion(Report.model_validate(fields), "en") if "Closest" in line).endswith(
        "Perplexity unchanged."
    )
    fields["artifacts"][3]["kl_divergence"] = 1.25e-7  # which five decimals would show as none
    assert "0,00000012 nats" in next(line for line in conclusion(Report.model_validate(fields), "es") if "fiel" in line)


def test_both_languages_have_the_same_words():
    assert LABELS["en"].keys() == LABELS["es"].keys() and len(METHOD["en"]) == len(METHOD["es"])


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._hidden = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._hidden = tag == "style"

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.text.append(data)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_is_whole_and_needs_no_other(fields, language):
    html = render(Report.model_validate(fields), language)
    page = Page(html)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe"} & set(names) and "@import" not in html
    assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)\S+", html)
    assert not [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert dict(page.tags[0][1]) == {"lang": language} and names.count("svg") == 3 and names.count("h1") == 1
    text = "".join(page.text)
    for item in fields["artifacts"]:
        assert item["name"] in text and item["continuation"].split()[-1] in text
        assert number(item["perplexity"], 2, language) in text
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    # Words that are not the baseline's are marked: its last one, of five rows.
    assert names.count("mark") == 5


def test_a_text_that_many_wrote_is_shown_once(fields):
    for item in fields["artifacts"][:4]:
        item["continuation"] = " y el perro"
    html = render(Report.model_validate(fields))
    assert "<dt>fp32, quick, small, faithful</dt>" in html and html.count("<dt>broken</dt>") == 1


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#777777") == 1
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the well-known grey that just fails


def with_rows(fields, names):
    """`fields` with copies of its second row under further names, all measured alike."""
    for name in names:
        fields["artifacts"].append(copy.deepcopy(fields["artifacts"][1]) | {"name": name})
    return fields


@pytest.mark.parametrize("more", [0, 1, 14])
def test_every_row_has_a_colour_of_its_own(fields, more):
    html = render(Report.model_validate(with_rows(fields, [f"further-{number}" for number in range(3 + more)])))
    count = len(fields["artifacts"])
    for theme in re.findall(r":root \{(.*?)\}", html, re.DOTALL):
        colours = dict(re.findall(r"--(c\d+): (#[0-9a-f]{6})", theme))
        assert list(colours) == [f"c{index}" for index in range(count)] and len(set(colours.values())) == count
    latency = html.split("<svg")[2]
    named = re.findall(r'<text class="name c(\d+)"', latency)
    assert sorted(map(int, named)) == list(range(count))
    # From the ninth row on, the marks have another shape too.
    assert latency.count('<path class="mark"') == 3 * max(0, count - 8) and latency.count("<circle") == 3 * min(
        count, 8
    )


def marks(plot):
    """The (x, y, r) of the circles of a plot, in the order in which they are drawn."""
    found = re.findall(r'<circle class="mark" cx="([\d.-]+)" cy="([\d.-]+)" r="([\d.]+)"', plot)
    return [tuple(map(float, mark)) for mark in found]


@pytest.mark.parametrize("speeds", [(500, 500, 500), (500, 90, 250)])
def test_no_dot_hides_another(fields, speeds):
    """Artifacts of one size and one quality: side by side, the smaller ones above the larger ones."""
    with_rows(fields, ["like", "alike"])
    for item, speed in zip((fields["artifacts"][1], *fields["artifacts"][-2:]), speeds, strict=True):
        for step in item["decode"]:
            step["tokens_per_second"] = float(speed)
    drawn = marks(render(Report.model_validate(fields)).split("<svg")[1])
    assert len(drawn) == 7  # all but PyTorch's
    assert [r for _, _, r in drawn] == sorted((r for _, _, r in drawn), reverse=True)
    assert apart(drawn)


def test_no_dot_hides_another_where_all_are_alike(fields):
    """Eight, of nearly one size, at the right end of the plot."""
    fields["artifacts"] = fields["artifacts"][:1]
    for step in range(7):
        item = copy.deepcopy(fields["artifacts"][0]) | {"name": f"like-{step}"}
        fields["artifacts"].append(item | {"bytes": item["bytes"] + 29_000 * step})
    drawn = marks(render(Report.model_validate(fields)).split("<svg")[1])
    assert len(drawn) == 8 and apart(drawn) and all(0 <= x <= 400 for x, _, _ in drawn)


def apart(drawn):
    """Whether no two marks have nearly the same centre."""
    return all(math.hypot(x - u, y - v) >= 6.9 for index, (x, y, _) in enumerate(drawn) for u, v, _ in drawn[:index])


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_pages_have_every_latency_and_both_protocols(fields, language):
    llama = {"perplexity": 64.3, "perplexity_stderr": 2.5, "windows": 7, "window_tokens": 512, "tokens_scored": 1785}
    texts = []
    for value in (llama, None):
        fields["artifacts"][0]["llama_cpp"] = value
        report = Report.model_validate(fields)
        texts.append(("".join(Page(render(report, language)).text), markdown(report, language)))
    for text in (*texts[0], *texts[1]):
        for item in fields["artifacts"]:
            for step in (*item["prefill"], *item["decode"]):
                shown = (number(step["p50_ms"], 2, language), number(step["p90_ms"], 2, language))
                assert " / ".join(shown) in text
        assert ("decode @1023" if language == "en" else "token tras 1023") in text
    said = {
        "en": ("7 disjoint windows", "shorter than its windows"),
        "es": ("7 ventanas disjuntas", "más corto que sus ventanas"),
    }
    for index, pages in enumerate(texts):
        assert all(said[language][index] in page and said[language][1 - index] not in page for page in pages)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_pages_name_instruction_sets_and_session_options(fields, language):
    report = Report.model_validate(fields)
    assert markdown(report, language).count(LABELS[language]["unknown"]) == 2  # a report from before these fields
    fields["machine"]["instructions"] = ["AVX2", "AVX-512 VNNI"]
    fields["artifacts"][0]["session_options"] = {"intra_op_num_threads": "2", "session.force_spinning_stop": "0"}
    report = Report.model_validate(fields)
    for page in ("".join(Page(render(report, language)).text), markdown(report, language).replace("\\", "")):
        assert "AVX2, AVX-512 VNNI" in page and "session.force_spinning_stop 0" in page
        assert LABELS[language]["instructions"] in page and LABELS[language]["session"] in page


def test_spanish_pages_have_no_english_words(fields):
    """No label, title or sentence of the English pages stands in the Spanish ones."""
    report = Report.model_validate(fields)
    words = re.compile(
        r"\b(the|of|and|each|with|prefill \d+|decode @|bits/byte|load|peak|test|baseline|tokens scored)\b"
    )
    for page in (markdown(report, "es"), "".join(Page(render(report, "es")).text)):
        assert not words.findall(page)


def test_every_text_can_be_read_in_light_and_dark(fields):
    with_rows(fields, [f"further-{number}" for number in range(20)])
    themes = re.findall(r":root \{(.*?)\}", render(Report.model_validate(fields)), re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme))
        texts = {"ink", "soft", "bad", *(f"c{index}" for index in range(26))}
        assert min(contrast(colours[name], colours["paper"]) for name in texts) >= 4.5
        assert contrast(colours["ink"], colours["mark"]) >= 4.5


def test_names_in_a_plot_do_not_overlap(fields):
    """Twins at almost the same place, and a name too long for any place."""
    for index, item in enumerate(fields["artifacts"][1:5] * 2):
        item = copy.deepcopy(item)
        item["name"] += f"-twin-{index}" if index else "-with-a-name-of-no-use-at-all.onnx"
        item["bytes"] += index
        fields["artifacts"].insert(5, item)
    for plot in render(Report.model_validate(fields)).split("<svg")[1:]:
        names = re.findall(
            r'<text class="name c\d+" text-anchor="(\w+)" x="([\d.-]+)" y="([\d.-]+)">(.*?)</text>', plot
        )
        assert len(names) >= 12
        boxes = []
        for anchor, x, y, name in names:
            width = 7 * len(name)  # above what any usual font takes at 11.5 px
            left = float(x) - (width if anchor == "end" else 0)
            assert left >= 0 and left + width <= 400 and 0 <= float(y) <= 300
            boxes.append((left, left + width, float(y)))
        for index, (left, right, y) in enumerate(boxes):
            for other_left, other_right, other_y in boxes[:index]:
                assert right <= other_left or other_right <= left or abs(y - other_y) >= 11


def test_nothing_in_a_report_breaks_out_of_the_page(fields):
    evil = '"><script>alert(1)</script><b onload=x>'
    fields["model"] = fields["prompt"] = fields["machine"]["cpu"] = fields["corpus"]["source"] = fields["versions"][
        "python"
    ] = evil
    for item in fields["artifacts"]:
        item["name"], item["continuation"] = item["name"] + evil, evil
    for language in LANGUAGES:
        page = Page(render(Report.model_validate(fields), language))
        assert not [tag for tag, attributes in page.tags if tag in ("script", "b") or "onload" in attributes]


@pytest.mark.parametrize("language", LANGUAGES)
def test_markdown_has_the_conclusion(fields, language):
    text = markdown(Report.model_validate(fields), language)
    assert all(f"- {line}" in text for line in conclusion(Report.model_validate(fields), language))
    assert f"## {LABELS[language]['conclusion']}" in text


def test_odd_reports_are_drawn_too(fields):
    """One artifact; a single document; equal figures; no error by layer."""
    odd = copy.deepcopy(fields)
    odd["artifacts"] = odd["artifacts"][:1]
    odd["artifacts"][0] |= {"key_error": None, "perplexity_stderr": None, "delta_ln_ppl_stderr": None}
    odd["artifacts"][0]["decode"] = odd["artifacts"][0]["decode"][:1]
    assert Page(render(Report.model_validate(odd))).tags
    for item in fields["artifacts"]:
        item |= {"bytes": 10**6, "delta_ln_ppl": 0.0}
    assert "nan" not in render(Report.model_validate(fields)).lower().replace("nanm", "")


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
@pytest.mark.skipif(not (ROOT / "js/node_modules").is_dir(), reason="no js/node_modules here; `make js` creates it")
def test_nothing_is_wider_than_a_phone(fields, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(render(Report.model_validate(fields), "es"), encoding="utf-8")
    command = ["node", "js/page_width.mjs", str(file), "390"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if "no Chromium" in done.stderr:
        pytest.skip("no Chromium here")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 390


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_loss_whose_factor_is_no_number_any_more_is_shown(fields, language):
    """As of a matmul without its scale, whose logits are in the thousands."""
    fields["artifacts"][4]["delta_ln_ppl"] = 5000.0
    report = Report.model_validate(fields)
    assert any("broken" in line for line in conclusion(report, language))
    assert "broken" in markdown(report, language) and "broken" in render(report, language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_called_fast_that_is_slower_than_the_baseline(fields, language):
    for item in fields["artifacts"][1:]:
        for shapes in (item["decode"], item["prefill"]):
            for one in shapes:
                one |= {"speedup": 0.5, "speedup_min": 0.4, "speedup_max": 0.6}
    fields["artifacts"][4]["delta_ln_ppl"] = math.inf
    needs = [pick.need for pick in picks(Report.model_validate(fields))]
    assert "decode" not in needs and {"no decode", "no prefill"} <= set(needs)
    text = "\n".join(conclusion(Report.model_validate(fields), language))
    assert ("Nothing writes faster" if language == "en" else "Nada escribe") in text and "broken" in text
