"""`python -m cuantiza.generate`: continue a text with an artifact, token by token."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.model_config import end_tokens, max_positions, read_config, start_token
from cuantiza.core.inputs.tokenizer import load_tokenizer
from cuantiza.core.machine.hardware import check_threads, default_threads
from cuantiza.core.run.sampling import Sampling, generate, text_of
from cuantiza.core.store.artifact import open_artifact


def main() -> int:
    args = _arguments()
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p, args.no_repeat_ngram)
    prompt = _prompt(args.prompt)
    artifact = open_artifact(args.artifact)
    tokenizer, config, start = (
        load_tokenizer(artifact.path),
        read_config(artifact.path),
        start_token(artifact.path),
    )
    ids = [start, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    room = max_positions(config) - len(ids)
    if room < 1:
        raise UserError(
            f"--prompt: has {len(ids)} tokens where {artifact.path} takes {len(ids) + room - 1}; shorten it"
        )

    from cuantiza.core.run.runtime import Runtime

    stop = end_tokens(artifact.path)
    runtime = Runtime(artifact.model, args.threads, spin=True)
    out, times = sys.stdout, [time.perf_counter()]

    def timed():
        for token in generate(runtime, ids, min(args.tokens, room), sampling, args.seed, stop):
            times.append(time.perf_counter())
            yield token

    print(prompt, end="", flush=True)
    for piece in text_of(tokenizer, timed(), ids):
        out.write(piece)
        out.flush()
    print(flush=True)
    _account(times, len(ids), args, room)
    return 0


def _prompt(given: str) -> str:
    """`given`, or what stands on standard input for "-". Raises UserError where that is no UTF-8."""
    try:
        text = sys.stdin.buffer.read().decode().rstrip("\n") if given == "-" else given
        text.encode()
    except UnicodeError:
        raise UserError("--prompt: is not UTF-8; convert it, for example with `iconv -f latin1 -t utf8`") from None
    return text


def _account(times: list[float], prompt: int, args: argparse.Namespace, room: int) -> None:
    """One line on standard error: what was made and how fast; the first token waits for the prompt."""
    count = len(times) - 1
    speed = f", {(count - 1) / (times[-1] - times[1]):.1f} tokens/s" if count > 1 else ""
    first = f", the first after {1000 * (times[1] - times[0]):.0f} ms" if count else ""
    drawn = "greedy" if args.greedy or args.temperature == 0 else f"seed {args.seed}"
    why = ""
    if count < args.tokens:
        why = "; the model's last position" if count == room else "; the model ended the text"
    print(f"{count} tokens behind {prompt}{first}{speed}, {drawn}{why}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cuantiza.generate", description=__doc__)
    default = Path("artifacts/es-mini/int8-dynamic")
    parser.add_argument("--artifact", type=Path, default=default, help=f"folder of the artifact (default {default})")
    parser.add_argument("--prompt", default="Me gusta mucho el futbol", help="what to continue; - reads standard input")
    parser.add_argument("--tokens", type=int, default=100, help="at most so many (default 100)")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token each time")
    parser.add_argument("--temperature", type=float, default=0.8, help="of sampling; 0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw from so many likeliest tokens; 0: all (default 50)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from this share of probability (default 0.95)")
    parser.add_argument(
        "--no-repeat-ngram", type=int, default=3, help="no so many tokens in a row come twice; 0: may (default 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="threads (default: all processors)")
    args = parser.parse_args()
    check_threads(args.threads)
    for option, least in (("tokens", 1), ("seed", 0)):
        if getattr(args, option) < least:
            raise UserError(f"--{option} {getattr(args, option)}: give a number from {least} on")
    return args


if __name__ == "__main__":
    run(main)
