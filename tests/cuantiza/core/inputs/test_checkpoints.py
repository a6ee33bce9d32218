"""`MODEL=owner/name[@revision]` with a stub hub on localhost: downloads, resuming, caching, and error messages."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import checkpoint_digest, model_name, resolve_model, weight_files
from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.store.artifact import open_artifact

from helpers import ES_MINI, ROOT, Result, assert_nothing_published, assert_user_error, copy_tokenizer, stage, tiny_gpt2
from hub_stub import Files, Hub, files_of, serving

REPOSITORY = "datificate/gpt2-small-spanish"
UNUSED = {
    "tf_model.h5": bytes(200_000),
    "flax_model.msgpack": bytes(200_000),
    ".gitattributes": b"*.bin",
}
# What a bundle passes on.
CARD = {"README.md": b"# GPT2-small-spanish", "LICENSE.txt": b"the licence"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as stub:
        yield stub


@pytest.fixture(scope="session")
def in_bin(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Files:
    """A repository like the course's: no safetensors, no tokenizer.json, but weights for other frameworks."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tiny_folder / name, folder)
    torch.save(load_file(tiny_folder / "model.safetensors"), folder / "pytorch_model.bin")
    return files_of(folder) | UNUSED | CARD


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "",
        "HF_HUB_ETAG_TIMEOUT": "2",
    }


@pytest.fixture
def export(environment: dict[str, str], tmp_path: Path) -> Callable[..., Result]:
    """`export(spec, **environment)` runs `python -m export --model spec` with the stub hub."""

    def call(spec: str, **changes: str) -> Result:
        return stage("export", "--model", spec, "--output", tmp_path / "artifacts", env=environment | changes)

    return call


@pytest.fixture
def resolve(environment: dict[str, str]) -> Callable[..., Result]:
    """`resolve(spec, **environment)` only downloads, in a child process, and prints the folder."""
    code = "from cuantiza.core.errors import run; from cuantiza.core.inputs.checkpoints import resolve_model; import sys; run(lambda: print(resolve_model(sys.argv[1]).folder) or 0)"

    def call(spec: str, **changes: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-c", code, spec],
            cwd=ROOT,
            env={**os.environ, **environment, **changes},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return call


def test_whole_pipeline(hub: Hub, in_bin: Files, export: Callable[..., Result], tmp_path: Path) -> None:
    """The first run downloads. Later runs use the cache: offline, with a failing server, and without any server."""
    hub.add(REPOSITORY, in_bin)
    first = export(REPOSITORY)
    assert first.status == 0, first.stderr
    assert "parity" in first.stderr
    artifact = open_artifact(tmp_path / "artifacts" / "datificate--gpt2-small-spanish" / "fp32")
    assert artifact.manifest.model == "datificate--gpt2-small-spanish"
    assert hub.transferred() == in_bin.keys() - UNUSED.keys()
    hub.requests.clear()

    again = export(REPOSITORY)
    assert again.status == 0 and "up to date" in again.stderr
    assert not hub.transferred()
    hub.requests.clear()

    offline = export(REPOSITORY, HF_HUB_OFFLINE="1")
    assert offline.status == 0 and "up to date" in offline.stderr, offline.stderr
    assert not hub.requests

    hub.broken = 503
    down = export(REPOSITORY)
    assert down.status == 0 and "up to date" in down.stderr, down.stderr

    unreachable = export(REPOSITORY, HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.status == 0 and "up to date" in unreachable.stderr, unreachable.stderr


def test_revision(hub: Hub, in_bin: Files, tiny_folder: Path, resolve: Callable[..., Result]) -> None:
    """The hub's own conversion to safetensors is a pull request; its files and `main`'s do not mix in the cache."""
    hub.add(REPOSITORY, in_bin)
    converted = files_of(tiny_folder)["model.safetensors"]
    hub.add(REPOSITORY, in_bin | {"model.safetensors": converted}, revision="refs/pr/1")
    folder = Path(resolve(f"{REPOSITORY}@refs/pr/1").stdout.strip())
    assert model_name(f"{REPOSITORY}@refs/pr/1") == "datificate--gpt2-small-spanish@refs--pr--1"
    assert "model.safetensors" in hub.transferred() and "pytorch_model.bin" not in hub.transferred()
    assert weight_files({file.name for file in folder.iterdir()}) == ["model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == converted
    main = Path(resolve(REPOSITORY).stdout.strip())
    assert weight_files({file.name for file in main.iterdir()}) == ["pytorch_model.bin"]
    # A commit works as a revision too, and the second time without a network.
    by_commit = resolve(f"{REPOSITORY}@{folder.name}")
    assert Path(by_commit.stdout.strip()) == folder, by_commit.stderr
    offline = resolve(f"{REPOSITORY}@refs/pr/1", HF_HUB_OFFLINE="1")
    assert Path(offline.stdout.strip()) == folder, offline.stderr


def test_sharded(hub: Hub, tmp_path: Path, tiny_folder: Path, resolve: Callable[..., Result]) -> None:
    shards = tmp_path / "shards"
    tiny_gpt2().save_pretrained(shards, max_shard_size="400KB")
    copy_tokenizer(shards)
    files = files_of(shards)
    hub.add("owner/sharded", files | UNUSED | {"pytorch_model.bin": bytes(300_000)})
    result = resolve("owner/sharded")
    assert result.status == 0, result.stderr
    assert hub.transferred() == files.keys() and len(files) >= 5


def test_name_without_owner(hub: Hub, in_bin: Files, resolve: Callable[..., Result]) -> None:
    hub.add("gpt2", in_bin)
    assert resolve("gpt2").status == 0
    assert model_name("gpt2") == "gpt2"


def test_newer_revision_is_fetched(hub: Hub, in_bin: Files, resolve: Callable[..., Result]) -> None:
    """If `main` moves, the next run uses its new commit and downloads only the changed files."""
    hub.add(REPOSITORY, in_bin)
    old = resolve(REPOSITORY).stdout.strip()
    config = json.dumps(json.loads(in_bin["config.json"]) | {"note": "newer"}).encode()
    hub.add(REPOSITORY, in_bin | {"config.json": config})
    hub.requests.clear()
    new = resolve(REPOSITORY).stdout.strip()
    assert new != old and (Path(new) / "config.json").read_bytes() == config
    assert hub.transferred() == {"config.json"}


def test_cut_transfer_goes_on(hub: Hub, in_bin: Files, resolve: Callable[..., Result]) -> None:
    """If the connection breaks within the weights, the next request asks only for the rest."""
    weights = os.urandom(24_000_000)
    hub.add(REPOSITORY, in_bin | {"pytorch_model.bin": weights})
    hub.cuts["pytorch_model.bin"] = 1
    result = resolve(REPOSITORY)
    assert result.status == 0, result.stderr
    assert (Path(result.stdout.strip()) / "pytorch_model.bin").read_bytes() == weights
    ranges = [
        asked
        for method, path, _, asked in hub.requests
        if method == "GET" and path.startswith("/cdn/") and path.endswith(".bin")
    ]
    assert ranges == [None, "bytes=10485760-"]  # the client writes by 10 MiB


def test_interrupted_run_is_taken_up(
    hub: Hub, in_bin: Files, resolve: Callable[..., Result], export: Callable[..., Result], tmp_path: Path
) -> None:
    """If the hub disappears midway, there is one error line and no artifact from half a checkpoint; later it works."""
    hub.add(REPOSITORY, in_bin)
    hub.cuts["pytorch_model.bin"] = -1
    result = export(REPOSITORY)
    assert_user_error(result, REPOSITORY, "network")
    assert_nothing_published(tmp_path / "artifacts")
    assert_user_error(
        resolve(REPOSITORY, HF_HUB_OFFLINE="1"), REPOSITORY, "not whole in the local cache", "HF_HUB_OFFLINE"
    )
    hub.cuts.clear()
    hub.requests.clear()
    assert resolve(REPOSITORY).status == 0
    assert hub.transferred() == {"pytorch_model.bin"}


def test_killed_run_is_taken_up(
    hub: Hub, in_bin: Files, environment: dict[str, str], resolve: Callable[..., Result]
) -> None:
    """A killed download leaves no file that a later run, online or offline, mistakes for a complete one."""
    hub.add(REPOSITORY, in_bin)
    hub.cuts["pytorch_model.bin"] = -1
    code = "import sys; from cuantiza.core.inputs.checkpoints import resolve_model; resolve_model(sys.argv[1])"
    child = subprocess.Popen(
        [sys.executable, "-c", code, REPOSITORY], cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while "pytorch_model.bin" not in hub.transferred() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.wait()
    assert_user_error(resolve(REPOSITORY, HF_HUB_OFFLINE="1"), REPOSITORY, "local cache")
    hub.cuts.clear()
    result = resolve(REPOSITORY)
    assert result.status == 0, result.stderr
    assert (Path(result.stdout.strip()) / "pytorch_model.bin").read_bytes() == in_bin["pytorch_model.bin"]


@pytest.mark.parametrize("spoilt", ["config.json", "vocab.json"])
def test_an_error_names_the_repository_and_not_the_cache(
    hub: Hub, in_bin: Files, export: Callable[..., Result], spoilt: str
) -> None:
    hub.add(REPOSITORY, in_bin | {spoilt: b"{"})
    line = assert_user_error(export(REPOSITORY), REPOSITORY)
    assert "snapshots" not in line and ".tmp-" not in line


def test_missing_repository(export: Callable[..., Result], tmp_path: Path) -> None:
    assert_user_error(export("datificate/gpt2-small-spanihs"), "MODEL=datificate/gpt2-small-spanihs", "spelling")
    assert_nothing_published(tmp_path / "artifacts")


def test_missing_revision(hub: Hub, in_bin: Files, resolve: Callable[..., Result]) -> None:
    hub.add(REPOSITORY, in_bin)
    assert_user_error(resolve(f"{REPOSITORY}@v9"), f"MODEL={REPOSITORY}@v9", "revision", "@")
    assert not hub.transferred()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_no_network_and_no_cache(resolve: Callable[..., Result], endpoint: str) -> None:
    assert_user_error(resolve(REPOSITORY, HF_ENDPOINT=endpoint), f"MODEL={REPOSITORY}", "network")


def test_offline_and_no_cache(hub: Hub, in_bin: Files, resolve: Callable[..., Result]) -> None:
    hub.add(REPOSITORY, in_bin)
    assert_user_error(resolve(REPOSITORY, HF_HUB_OFFLINE="1"), f"MODEL={REPOSITORY}", "cache")
    assert not hub.requests


@pytest.mark.parametrize("status", [500, 503, 403, 418])
def test_hub_in_trouble(hub: Hub, in_bin: Files, resolve: Callable[..., Result], status: int) -> None:
    hub.add(REPOSITORY, in_bin)
    hub.broken = status
    assert_user_error(resolve(REPOSITORY), f"MODEL={REPOSITORY}")


def test_only_other_frameworks(hub: Hub, in_bin: Files, resolve: Callable[..., Result]) -> None:
    """The repository is refused before anything is downloaded."""
    hub.add("owner/tf", {name: data for name, data in in_bin.items() if name != "pytorch_model.bin"})
    assert_user_error(resolve("owner/tf"), "MODEL=owner/tf", "TensorFlow", "save_pretrained")
    hub.add("owner/gguf", {"modelo-Q4_K_M.gguf": b"GGUF", "README.md": b"# GGUF"})
    assert_user_error(resolve("owner/gguf"), "MODEL=owner/gguf", "modelo-Q4_K_M.gguf", "llama.cpp")
    assert not hub.transferred()


def test_full_disk(hub: Hub, in_bin: Files, resolve: Callable[..., Result], tmp_path: Path) -> None:
    """The cache is on a disk that is too small for the weights."""
    disk = tmp_path / "small"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a tmpfs takes root")
    try:
        hub.add(REPOSITORY, in_bin)
        assert_user_error(resolve(REPOSITORY, HF_HOME=str(disk)), "space")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_local_folders_need_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a folder has the same name as a hub id, the folder is used."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_model("owner/name").folder == Path("owner/name")
    assert (model_name("owner/name"), model_name("owner/name/"), model_name(".")) == ("name", "name", tmp_path.name)
    assert resolve_model(str(ES_MINI)).name == "es-mini"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        resolve_model("file")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ({"model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"}, ["model.safetensors"]),
        (
            {
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "pytorch_model.bin",
            },
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (
            {"pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "training_args.bin", "optimizer.bin"},
            ["pytorch_model.bin"],
        ),
        (
            {"pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "scheduler.bin"},
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        ),
        ({"tf_model.h5", "adapter_model.safetensors", "onnx/model.safetensors"}, []),
        (set(), []),
    ],
)
def test_weight_files(names: set[str], wanted: list[str]) -> None:
    assert weight_files(names) == wanted


@pytest.mark.parametrize("name", ["spiece.model", "none"])
def test_a_tokenizer_that_cannot_be_read_is_told_before_weights_are_downloaded(
    hub: Hub, in_bin: Files, resolve: Callable[..., Result], name: str
) -> None:
    if name == "spiece.model" and importlib.util.find_spec("sentencepiece") is not None:
        pytest.skip("sentencepiece is installed here")
    files = {path: data for path, data in in_bin.items() if path not in ("vocab.json", "merges.txt", "tokenizer.json")}
    hub.add("owner/other", files | ({name: b"\n"} if name != "none" else {}))
    result = resolve("owner/other")
    line = assert_user_error(result, "MODEL=owner/other", "has no tokenizer" if name == "none" else "sentencepiece")
    assert not hub.transferred(), line


@pytest.mark.parametrize(
    "change, fragment", [({"model_type": "mixtral"}, "mixtral"), ({"quantization_config": {"bits": 4}}, "quant")]
)
def test_a_model_that_cannot_be_exported_is_told_before_weights_are_downloaded(
    hub: Hub, in_bin: Files, export: Callable[..., Result], change: dict, fragment: str
) -> None:
    hub.add("owner/other", in_bin | {"config.json": json.dumps(json.loads(in_bin["config.json"]) | change).encode()})
    assert_user_error(export("owner/other"), "owner/other", fragment)
    assert not {"pytorch_model.bin", "model.safetensors"} & {*hub.transferred()}


def test_what_a_tokenizer_is_made_of_is_downloaded_and_counts(
    hub: Hub, in_bin: Files, resolve: Callable[..., Result]
) -> None:
    """Whatever the file is called, another content is another checkpoint."""
    more = {"chat_template.jinja": b"a", "additional_chat_templates/rag.jinja": b"b", "aitextgen-vocab.json": b"{}"}
    more |= {"vocab.txt": b"x", "added_tokens.json": b"{}"}
    hub.add("owner/other", in_bin | more)
    folder = Path(resolve("owner/other").stdout.strip())
    for name, data in more.items():
        assert (folder / name).read_bytes() == data
    copy = shutil.copytree(folder, folder.parent / "copy")
    seen = {checkpoint_digest(copy)}
    for name in more:
        (copy / name).write_bytes(b"changed")
        seen.add(checkpoint_digest(copy))
    assert len(seen) == len(more) + 1


@pytest.mark.parametrize(
    ("package", "read", "fragments"),
    [
        ("datasets", lambda: load_splits(Source("noveal.txt")), ("CORPUS=noveal.txt", "cuantiza[corpora]")),
        ("httpx2", lambda: resolve_model("modles"), ("MODEL=modles", "cuantiza[export]")),
        ("huggingface_hub", lambda: resolve_model("modles"), ("MODEL=modles", "cuantiza[export]")),
    ],
)
def test_a_mistyped_path_is_told_before_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, package: str, read: Callable[[], object], fragments: tuple[str, str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    with pytest.raises(UserError, match="is neither a file nor a folder here; if it is an id of the hub") as raised:
        read()
    said = str(raised.value)
    assert said.startswith(fragments[0]) and f"takes {package}, " in said and fragments[1] in said
