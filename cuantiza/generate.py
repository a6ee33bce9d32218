"""Continues a text with an artifact, token by token, or answers it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cuantiza.core.cli import Parser, add_folder, add_number, add_threads, check_numbers
from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.defaults import ARTIFACTS, MODEL, PROMPT, RECIPES
from cuantiza.core.run.sampling import Sampling
from cuantiza.core.store.artifact import open_artifact
from cuantiza.core.store.digests import sha256_known


def main(arguments: Sequence[str] | None = None) -> int:
    args = _arguments(arguments)
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p, args.no_repeat_ngram)
    prompt = _prompt(args.prompt)
    artifact = open_artifact(args.artifact, sha256_known)

    from cuantiza.model import load

    model = load(artifact, args.threads)
    asked = model.chat(prompt) if args.chat else None
    ids = model.encode(prompt) if asked is None else asked.ids
    room = model.room(ids)
    times = [time.perf_counter()]

    def timed() -> Iterator[int]:
        for token in model.tokens(ids, args.tokens, sampling, args.seed, asked):
            times.append(time.perf_counter())
            yield token

    if asked is None:
        print(prompt, end="", flush=True)
    for piece in model.text(timed(), ids):
        print(piece, end="", flush=True)
    print(flush=True)
    _print_speed(times, len(ids), args, room)
    return 0


def _prompt(given: str) -> str:
    """The prompt: `given`, or standard input if it is "-". Raises UserError if that is not UTF-8."""
    try:
        text = sys.stdin.buffer.read().decode().rstrip("\n") if given == "-" else given
        text.encode()
    except UnicodeError:
        raise UserError("--prompt: is not UTF-8; convert it, for example with `iconv -f cp1252 -t utf8`") from None
    return text


def _print_speed(times: list[float], prompt: int, args: argparse.Namespace, room: int) -> None:
    """Print to standard error how many tokens were generated and how fast. The first one includes the prefill."""
    count = len(times) - 1
    speed = f", {(count - 1) / (times[-1] - times[1]):.1f} tokens/s" if count > 1 else ""
    first = f", the first after {1000 * (times[1] - times[0]):.0f} ms" if count else ""
    drawn = "greedy" if args.greedy or args.temperature == 0 else f"seed {args.seed}"
    why = ""
    if count < args.tokens:
        why = (
            "; the model's last position"
            if count == room
            else f"; the model ended the {'answer' if args.chat else 'text'}"
        )
    print(f"{count} tokens after {prompt}{first}{speed}, {drawn}{why}", file=sys.stderr)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("generate", __doc__, 'cuantiza generate --artifact artifacts/es-mini/int8-dynamic --prompt "Hola"')
    default = ARTIFACTS / Path(MODEL).name / RECIPES[0]
    add_folder(parser, "--artifact", default, "folder of the artifact")
    parser.add_argument("--prompt", default=PROMPT, help=f"what to continue; - reads standard input ({PROMPT})")
    parser.add_argument(
        "--chat", action="store_true", help="answer the prompt, by the model's chat template; not all models have one"
    )
    add_number(parser, "--tokens", 100, "how many tokens at most")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token each time")
    parser.add_argument("--temperature", type=float, default=0.8, help="of sampling; 0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw from so many likeliest tokens; 0: all (default 50)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from this share of probability (default 0.95)")
    parser.add_argument(
        "--no-repeat-ngram",
        type=int,
        default=3,
        help="no sequence of so many tokens repeats in prompt and text, or with --chat in the answer; 0: any may (default 3)",
    )
    add_number(parser, "--seed", 0, "the same seed gives the same text")
    add_threads(parser)
    args = parser.parse_args(arguments)
    check_numbers(args, tokens=1, seed=0)
    return args


if __name__ == "__main__":
    run(main)
