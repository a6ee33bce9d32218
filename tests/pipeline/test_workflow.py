"""The GitHub Actions workflow that a user copies: it calls what exists, and gives strangers no rights."""

import re
import shlex

import yaml

from cuantiza.eval.compare.cli import parser

from helpers import ROOT


def workflow() -> tuple[dict, str]:
    path = ROOT / "docs/examples/compare.yml"
    return yaml.safe_load(path.read_text(encoding="utf-8")), path.read_text(encoding="utf-8")


def test_the_workflow_gives_strangers_no_rights():
    fields, text = workflow()
    assert fields["permissions"] == {} and "pull_request" in fields[True]  # YAML reads `on` as true
    jobs = fields["jobs"]
    assert "pull_request_target" not in text and "secrets." not in text
    assert jobs["compare"]["permissions"] == {"contents": "read"}
    assert jobs["comment"]["permissions"] == {"pull-requests": "write"}
    # What may write runs no code of the pull request, and not for one from a fork.
    assert not [step for step in jobs["comment"]["steps"] if "run" in step or "checkout" in step.get("uses", "")]
    assert "head.repo.full_name == github.repository" in jobs["comment"]["if"]
    for job in jobs.values():
        for step in job["steps"]:
            assert "uses" not in step or re.fullmatch(r"actions/[a-z/-]+@[0-9a-f]{40}", step["uses"]), step


def test_the_workflow_calls_what_exists():
    fields, _ = workflow()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"\$\(([A-Z_]+)\)", makefile))
    commands = [
        line for step in fields["jobs"]["compare"]["steps"] for line in step.get("run", "").splitlines() if line.strip()
    ]
    assert any(line.startswith("make -C head compare ") for line in commands)
    for line in commands:
        program, *words = shlex.split(line)
        assert program == "make"
        words = [word for number, word in enumerate(words) if word != "-C" and words[max(0, number - 1)] != "-C"]
        for word in words:
            name, given, value = word.partition("=")
            assert name in (variables if given else targets), word
            if name == "ARGS":
                parser().parse_args(["a", "b", *shlex.split(value)])
    make_compare = re.search(r"^compare:.*\n\t(.+)", makefile, re.MULTILINE).group(1)
    assert "cuantiza compare" in make_compare and "$(ARGS)" in make_compare
