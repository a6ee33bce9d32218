"""The bundle for the hub: optimum and transformers.js load it without options, and its card agrees with the report."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import onnx
import pytest

from cuantiza.bundle.__main__ import main
from cuantiza.core.errors import UserError
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store.artifact import open_artifact
from cuantiza.core.store.digests import sha256_file
from cuantiza.quantize.recipes.registry import RECIPES as REGISTRY
from cuantiza.quantize.recipes.registry import to_json
from cuantiza.quantize.settings import Calibration

from helpers import ES_MINI, ROOT, assert_user_error, stage

RECIPES = ("int8-dynamic", "int4-weight", "fp16")
OPTIMUM = ROOT / ".venv-optimum/bin/python"
PROMPT = "Me gusta mucho el futbol"
needs_js = pytest.mark.skipif(
    shutil.which("node") is None or not (ROOT / "js/node_modules").is_dir(),
    reason="no node here, or no js/node_modules; `make js` creates it",
)

# Continues a prompt with each library's usual classes.
_OPTIMUM = """
import sys, json
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt")
out = []
for options in json.loads(sys.argv[3]):
    model = ORTModelForCausalLM.from_pretrained(sys.argv[1], **options)
    made = model.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    out.append(made[0, inputs["input_ids"].shape[1]:].tolist())
print(json.dumps([inputs["input_ids"][0].tolist(), out]))
"""
_TRANSFORMERS_JS = """
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";
const [folder, name, prompt, dtypes] = process.argv.slice(1);
env.allowRemoteModels = false;
env.localModelPath = folder;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const inputs = await tokenizer(prompt);
const out = [];
for (const dtype of JSON.parse(dtypes)) {
  const model = await AutoModelForCausalLM.from_pretrained(name, { dtype });
  const made = await model.generate({ ...inputs, do_sample: false, max_new_tokens: 8, eos_token_id: null });
  out.push(Array.from(made.data, Number).slice(inputs.input_ids.dims[1]));
}
console.log(JSON.stringify([Array.from(inputs.input_ids.data, Number), out]));
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder of the artifacts, folder of the reports, folder of the bundle)."""
    # The artifacts are not shared with other tests, since a test below needs some recipes to be missing.
    artifacts, reports, dist, quick = (tmp_path_factory.mktemp(name) for name in ("a", "r", "d", "q"))
    artifacts /= "es-mini"
    for name in ("int8-dynamic", "int4-weight"):  # only the form of the graph matters here
        recipe = replace(REGISTRY[name], rounding="nearest", calibration=Calibration(8, 32))
        (quick / f"{name}.json").write_text(json.dumps(to_json(recipe)), encoding="utf-8")
    little = ("--tokens", 300, "--rounds", 1, "--without-torch")
    for arguments in (
        ("export", "--output", artifacts.parent),
        ("quantize", "--recipes", *sorted(quick.iterdir()), "fp16", "--output", artifacts.parent),
        ("eval", "--recipes", "fp32", *RECIPES, "--artifacts", artifacts.parent, "--output", reports, *little),
        ("cuantiza.bundle", "--artifacts", artifacts.parent, "--reports", reports, "--output", dist),
    ):
        result = stage(*arguments)
        assert result.status == 0, result.stderr
    return artifacts, reports, dist / "es-mini"


def greedy(model, ids):
    made, runtime = list(ids), Runtime(model, 2)
    for _ in range(8):
        made.append(int(runtime.forward(np.asarray([made]))[0, -1].argmax()))
    return made[len(ids) :]


def test_the_folder(built):
    artifacts, _, bundle = built
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    graphs = {"onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/model_q4.onnx", "onnx/model_fp16.onnx"}
    assert (
        graphs
        | {
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "README.md",
            "CHECKPOINT.md",
        }
        == files
    )
    for recipe, name in zip(("fp32", *RECIPES), ("", "_quantized", "_q4", "_fp16"), strict=True):
        assert sha256_file(bundle / f"onnx/model{name}.onnx") == sha256_file(artifacts / recipe / "model.onnx")


def test_the_card_has_the_measured_figures(built):
    _, reports, bundle = built
    card = (bundle / "README.md").read_text(encoding="utf-8")
    report = json.loads((reports / "es-mini/report.json").read_text(encoding="utf-8"))
    yaml = pytest.importorskip("yaml")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["language"] == "es" and head["pipeline_tag"] == "text-generation" and "onnx" in head["tags"]
    assert "base_model" not in head and head["license"] == "other" and head["license_link"] == "CHECKPOINT.md"
    assert (bundle / "CHECKPOINT.md").read_bytes() == (ES_MINI / "README.md").read_bytes()
    for row in report["artifacts"]:
        line = next(line for line in card.splitlines() if line.startswith("|") and f"| {row['name']} |" in line)
        assert f"{row['perplexity']:.2f}" in line and f"{row['model_bytes'] / 1e6:.1f}" in line


def example(bundle, language, number):
    """An example of the card, with the bundle's folder in place of the id that it would have on the hub."""
    code = (bundle / "README.md").read_text(encoding="utf-8").split(f"```{language}\n")[number].split("```")[0]
    return code.replace('"owner/es-mini"', json.dumps(str(bundle) if language == "python" else bundle.name))


def in_the_report(built):
    """The prompt and its continuation by the artifact that the examples use."""
    report = json.loads((built[1] / "es-mini/report.json").read_text(encoding="utf-8"))
    row = next(row for row in report["artifacts"] if row["name"] == "int8-dynamic")
    return report["prompt"] + row["continuation"]


def test_the_cards_plain_example_gives_the_reports_text(built, monkeypatch, capsys):
    monkeypatch.chdir(built[2])
    names: dict = {}
    exec(example(built[2], "python", 2), names)
    assert names["text"] == in_the_report(built) and capsys.readouterr().out == names["text"] + "\n"
    assert names["logits"].shape == (1, 1, 8192) and len(names["made"]) == 32


@pytest.mark.skipif(not OPTIMUM.exists(), reason="no .venv-optimum here; `make optimum` creates it")
def test_the_cards_optimum_example_gives_the_reports_text(built):
    command = [OPTIMUM, "-c", example(built[2], "python", 1)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip("\n") == in_the_report(built)


@needs_js
def test_the_cards_javascript_example_gives_the_reports_text(built):
    imports, code = example(built[2], "js", 1).split("\n", 1)
    local = "import { env } from '@huggingface/transformers'; env.allowRemoteModels = false;"
    local += f" env.localModelPath = {json.dumps(str(built[2].parent))};"
    command = ["node", "--input-type=module", "-e", "\n".join([imports, local, code])]
    done = subprocess.run(command, cwd=ROOT / "js", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip("\n") == in_the_report(built)


@pytest.mark.skipif(not OPTIMUM.exists(), reason="no .venv-optimum here; `make optimum` creates it")
def test_optimum_loads_it(built):
    artifacts, _, bundle = built
    options = [{}, {"file_name": "model_quantized.onnx"}]
    command = [OPTIMUM, "-c", _OPTIMUM, bundle, PROMPT, json.dumps(options)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ids, made = json.loads(done.stdout.splitlines()[-1])
    assert made[0] == greedy(artifacts / "fp32/model.onnx", ids)
    assert made[1] == greedy(artifacts / "int8-dynamic/model.onnx", ids)


@needs_js
def test_transformers_js_loads_it_by_dtype(built):
    artifacts, _, bundle = built
    command = ["node", "--input-type=module", "-e", _TRANSFORMERS_JS, bundle.parent, bundle.name, PROMPT]
    done = subprocess.run(
        [*command, json.dumps(["fp32", "q8", "q4", "fp16"])],
        cwd=ROOT / "js",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ids, made = json.loads(done.stdout.splitlines()[-1])
    for recipe, tokens in zip(("fp32", *RECIPES), made, strict=True):
        assert tokens == greedy(artifacts / recipe / "model.onnx", ids), recipe


def test_weights_beside_the_graph_get_names_of_their_own(built, tmp_path, monkeypatch):
    """Artifacts of models above 2 GB all call their data file model.onnx.data, so a bundle must rename it."""
    from cuantiza.bundle.files import assemble, open_all
    from cuantiza.core.store import artifact

    shutil.copytree(built[0], tmp_path / "es-mini")
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT_BYTES", 1000)
    parent = None
    for recipe in ("fp32", "fp16"):
        old, work = open_artifact(tmp_path / "es-mini" / recipe).manifest, tmp_path / recipe
        work.mkdir()
        artifact.copy_companions(tmp_path / "es-mini" / recipe, work)
        onnx_file.save(onnx_file.load(tmp_path / "es-mini" / recipe / "model.onnx"), work)
        fields = {key: getattr(old, key) for key in ("name", "model", "recipe", "inputs", "versions", "details")}
        published = artifact.publish(work, tmp_path / "es-mini" / recipe, parent=parent, calibration=None, **fields)
        assert onnx_file.DATA in published.manifest.files
        parent = parent or published.digest
    (tmp_path / "bundle").mkdir()
    assemble(open_all(tmp_path / "es-mini", ["fp16"]), {}, "card", tmp_path / "bundle")
    ids = np.asarray([[0, 300, 301]])
    for name, recipe in (("model", "fp32"), ("model_fp16", "fp16")):
        graph = tmp_path / "bundle/onnx" / f"{name}.onnx"
        assert (graph.parent / f"{name}.onnx_data").is_file()
        locations = {info.location for _, info in onnx_file.external_data(onnx.load(graph, load_external_data=False))}
        assert locations == {f"{name}.onnx_data"}
        assert np.array_equal(Runtime(graph, 2).forward(ids), Runtime(built[0] / recipe / "model.onnx", 2).forward(ids))
    config = json.loads((tmp_path / "bundle/config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model.onnx": True, "model_fp16.onnx": True}


def test_the_embedded_model_is_no_repository_from_elsewhere_either(built, tmp_path, monkeypatch):
    artifacts, reports, bundle = built
    monkeypatch.chdir(tmp_path)
    assert main(["--artifacts", str(artifacts.parent), "--reports", str(reports)]) == 0
    card = (tmp_path / "dist/es-mini/README.md").read_text(encoding="utf-8")
    assert card == (bundle / "README.md").read_text(encoding="utf-8") and "models/es-mini" not in card


@pytest.mark.parametrize("name", [".git/HEAD", "onnx/mine.onnx", "LICENSE"])
def test_what_a_user_added_is_not_deleted(built, tmp_path, name):
    """A bundle of other recipes is replaced, and so is a card that was edited."""
    artifacts, reports, bundle = built
    target = shutil.copytree(bundle, tmp_path / "dist/es-mini")
    for lock in bundle.parent.glob(".*"):
        shutil.copy(lock, target.parent)
    (target / "README.md").write_text("edited", encoding="utf-8")
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("mine", encoding="utf-8")
    given = ["--artifacts", str(artifacts.parent), "--reports", str(reports), "--output", str(target.parent)]
    with pytest.raises(UserError, match=rf"dist/es-mini: holds '{name}', .*DIST="):
        main([*given, "--recipes", "int8-dynamic"])
    assert (target / name).read_text(encoding="utf-8") == "mine" and (target / "onnx/model_q4.onnx").is_file()
    (target / name).unlink()
    assert main([*given, "--recipes", "int8-dynamic"]) == 0
    assert not (target / "onnx/model_q4.onnx").exists() and "edited" not in (target / "README.md").read_text("utf-8")


def test_bad_input(built, tmp_path):
    artifacts, reports, _ = built
    options = ("--artifacts", artifacts.parent, "--output", tmp_path / "dist")

    def refused(*more, fragments):
        assert_user_error(stage("cuantiza.bundle", *options, *more), *fragments)
        assert not (tmp_path / "dist" / "es-mini").exists()

    refused("--reports", tmp_path, fragments=("report.json", "make eval"))
    refused("--reports", reports, "--recipes", "ort-static", fragments=("--recipes ort-static", "int4-weight"))
    refused("--reports", reports, "--recipes", "int8-static", fragments=("int8-static", "make export quantize"))
    stale = tmp_path / "reports/es-mini"
    stale.mkdir(parents=True)
    report = json.loads((reports / "es-mini/report.json").read_text(encoding="utf-8"))
    report["inputs"]["artifacts"][1][1] = "0" * 64
    (stale / "report.json").write_text(json.dumps(report), encoding="utf-8")
    refused("--reports", tmp_path / "reports", fragments=("did not measure", "int8-dynamic"))
    (stale / "report.json").write_text("[]", encoding="utf-8")
    refused("--reports", tmp_path / "reports", fragments=("report.json", "make eval"))


def test_names_are_checked_before_anything_is_opened(tmp_path, capsys):
    """Neither artifacts nor a report are there; make asks for the names before it measures for minutes."""
    assert main(["--names", "--recipes", "int4-weight", "fp32"]) == 0
    assert capsys.readouterr().out.split("\n") == ["fp32: onnx/model.onnx", "int4-weight: onnx/model_q4.onnx", ""]
    for more in ([], ["--names"], ["--artifacts", str(tmp_path)]):
        with pytest.raises(UserError, match=r"--recipes int8-dynamic-ort fp32-ort: no dtype name .*int8-static"):
            main(["--recipes", "int8-dynamic-ort", "fp16", "fp32-ort", *more])


def test_make_checks_the_names_first():
    told = subprocess.run(["make", "-n", "bundle"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [line for line in told.splitlines() if " -m " in line]
    (names,) = (number for number, line in enumerate(commands) if "cuantiza.bundle" in line and "--names" in line)
    assert names < min(number for number, line in enumerate(commands) if re.search(r"-m (export|quantize|eval) ", line))
