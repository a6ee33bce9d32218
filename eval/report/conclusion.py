"""Draw the conclusion of a report: which artifact for which need, and what each costs. Figures alone decide.

An artifact is usable if its ln perplexity rises by at most RUINED. Besides the baseline, the best is named for five
needs: the smallest, the fastest in decode, the fastest in prefill, the nearest to the baseline (least KL divergence),
and the best all round. The last has the least size × decode time × prefill time among those whose measured ln
perplexity rises by at most CLOSE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cuantiza.core.pages import number, percent, rise, signed_percent, significant
from cuantiza.eval.report.schema import Report, Row, Timing

RUINED, CLOSE = 0.1, 0.005  # nats per token


@dataclass(frozen=True)
class Pick:
    """The best `row` for a `need`. For speed, `level` names the rows that may be as fast, given the rounds' spread."""

    need: str
    row: Row
    level: tuple[str, ...] = ()


def picks(report: Report) -> list[Pick]:
    """Pick the best usable artifact for each need. The list is empty if only the baseline is usable."""
    usable = [row for row in report.artifacts[1:] if row.delta_ln_ppl <= RUINED and not row.is_torch]
    if not usable:
        return []
    found = [Pick("smallest", min(usable, key=lambda row: row.bytes))]
    for phase in ("decode", "prefill"):
        best = min(usable, key=lambda row: row.usual(phase).p50_ms)
        if best.usual(phase).speedup <= 1:
            found.append(Pick(f"no {phase}", best))
            continue
        level = [row.name for row in usable if row is not best and _level(best.usual(phase), row.usual(phase))]
        found.append(Pick(phase, best, tuple(level)))
    found.append(Pick("nearest", min(usable, key=lambda row: row.kl_divergence)))
    if close := [row for row in usable if row.delta_ln_ppl <= CLOSE]:
        found.append(Pick("all-round", min(close, key=_cost)))
    return found


def _level(best: Timing, other: Timing) -> bool:
    """Whether `other` may be as fast as `best`: its best round is no slower than the worst round of `best`."""
    return other.speedup_max >= best.speedup_min


def _cost(row: Row) -> float:
    return row.bytes * row.usual("decode").p50_ms * row.usual("prefill").p50_ms


def conclusion(report: Report, language: str) -> list[str]:
    """Write the conclusion in `language` (en, es). Each item is a paragraph."""
    say = _ES if language == "es" else _EN
    first, *others = report.artifacts
    found = picks(report)
    lines = [say[pick.need].format(**_facts(pick, first, language, say)) for pick in found]
    if not found:
        lines.append(say["none"].format(first=first.name))
    for row in others:
        if not math.isfinite(row.delta_ln_ppl):
            lines.append(say["not finite"].format(name=row.name))
        elif row.delta_ln_ppl > RUINED:
            cost = percent(rise(row.delta_ln_ppl), 0, language)
            lines.append(say["ruined"].format(name=row.name, cost=cost, first=first.name))
    quantized = [row for row in others if row.is_torch and row.modules_quantized]
    for row in quantized:
        lines.append(
            say["course"].format(
                name=row.name,
                some=number(row.modules_quantized or 0, 0, language),
                all=number(row.modules_with_weights or 0, 0, language),
                size=percent(row.bytes / first.bytes, 0, language),
                speed=number(row.usual("decode").speedup, 2, language),
                first=first.name,
            )
        )
    return lines


def _facts(pick: Pick, first: Row, language: str, say: dict) -> dict[str, str]:
    row = pick.row
    decode, prefill = row.usual("decode"), row.usual("prefill")
    return {
        "name": row.name,
        "first": first.name,
        "megabytes": number(row.bytes / 1e6, 1, language),
        "share": percent(row.bytes / first.bytes, 0, language),
        "decode": number(decode.p50_ms, 2, language),
        "decode_speedup": number(decode.speedup, 2, language),
        "position": number(decode.at, 0, language),
        "prefill": number(prefill.p50_ms, 0, language),
        "prefill_speedup": number(prefill.speedup, 2, language),
        "tokens": number(prefill.at, 0, language),
        "kl": _nats(row.kl_divergence, language),
        "same_top": percent(row.top1_agreement, 1, language),
        "close": percent(math.expm1(CLOSE), 1, language),
        "cost": _quality(row, language, say),
        "level": say["level"].format(names=", ".join(pick.level)) if pick.level else "",
    }


def _nats(value: float, language: str) -> str:
    """Format `value` with five decimals, as in the table. Smaller values get two significant figures, and 0 stays 0."""
    return number(value, 5, language) if value >= 1e-5 else significant(value, 2 if value else 1, language)


def _quality(row: Row, language: str, say: dict) -> str:
    """Say how much perplexity changes, and whether that is within the sampling error of two standard errors."""
    cost, stderr = math.expm1(row.delta_ln_ppl), row.delta_ln_ppl_stderr
    if row.delta_ln_ppl == 0:
        return say["cost none"]
    if stderr is None:
        return say["cost alone"].format(cost=signed_percent(cost, 2, language))
    key = "cost within" if abs(row.delta_ln_ppl) <= 2 * stderr else "cost"
    return say[key].format(cost=signed_percent(cost, 2, language), stderr=percent(stderr, 2, language))


_EN = {
    "no decode": "**Nothing writes faster than {first}** on this machine.",
    "no prefill": "**Nothing reads faster than {first}** on this machine.",
    "not finite": "**Do not use {name}**: its likelihoods are not finite.",
    "smallest": "**Smallest: {name}**, {megabytes} MB, {share} of {first}'s size. {cost}",
    "decode": "**Fastest to write: {name}**, {decode} ms per token after {position} tokens of context, {decode_speedup} times as "
    "fast as {first}{level}. {cost}",
    "prefill": "**Fastest to read: {name}**, {prefill} ms for a prompt of {tokens} tokens, {prefill_speedup} times as fast as "
    "{first}{level}. {cost}",
    "nearest": "**Closest to {first}: {name}**, KL divergence {kl} nats per token, the same likeliest token at {same_top} of "
    "positions. {cost}",
    "all-round": "**Best all round: {name}**. Of those whose perplexity rises by at most {close}, it has the smallest product of size, "
    "decode time and prefill time: {megabytes} MB, decode {decode_speedup} times and prefill {prefill_speedup} times as fast as {first}.",
    "none": "No artifact beside {first} is usable; `make quantize` builds others.",
    "ruined": "**Do not use {name}**: its perplexity is {cost} higher than {first}'s.",
    "course": "`{name}` is the exercise's call, `quantize_dynamic`: PyTorch quantized {some} of {all} modules with weights; its file is "
    "{size} of {first}'s size, and it decodes at {speed} times its speed.",
    "level": " (the spread of the rounds does not tell it from {names})",
    "cost": "Perplexity {cost} ± {stderr}.",
    "cost within": "Perplexity {cost} ± {stderr}, within the sampling error.",
    "cost alone": "Perplexity {cost}; one document gives no standard error.",
    "cost none": "Perplexity unchanged.",
}
_ES = {
    "no decode": "**Nada escribe más rápido que {first}** en esta máquina.",
    "no prefill": "**Nada lee más rápido que {first}** en esta máquina.",
    "not finite": "**No use {name}**: sus verosimilitudes no son finitas.",
    "smallest": "**El más pequeño: {name}**, {megabytes} MB, el {share} de lo que ocupa {first}. {cost}",
    "decode": "**El más rápido al escribir: {name}**, {decode} ms por token tras {position} tokens de contexto, {decode_speedup} veces la "
    "velocidad de {first}{level}. {cost}",
    "prefill": "**El más rápido al leer: {name}**, {prefill} ms para un prompt de {tokens} tokens, {prefill_speedup} veces la velocidad de "
    "{first}{level}. {cost}",
    "nearest": "**El más fiel a {first}: {name}**, divergencia KL de {kl} nats por token; el token más probable coincide en el "
    "{same_top} de las posiciones. {cost}",
    "all-round": "**El más equilibrado: {name}**. De aquellos cuya perplejidad sube como máximo un {close}, es el de menor producto de "
    "tamaño, tiempo por token y tiempo de lectura: {megabytes} MB; escribe a {decode_speedup} veces y lee a {prefill_speedup} veces "
    "la velocidad de {first}.",
    "none": "Aparte de {first} no hay ningún artefacto utilizable; `make quantize` crea otros.",
    "ruined": "**No use {name}**: su perplejidad es un {cost} más alta que la de {first}.",
    "course": "`{name}` es la llamada del ejercicio, `quantize_dynamic`: PyTorch cuantizó {some} de {all} módulos con pesos; su archivo "
    "ocupa el {size} de lo que ocupa {first}, y decodifica a {speed} veces su velocidad.",
    "level": " (la dispersión de las rondas no permite distinguirlo de {names})",
    "cost": "Perplejidad: {cost} ± {stderr}.",
    "cost within": "Perplejidad: {cost} ± {stderr}, dentro del error de muestreo.",
    "cost alone": "Perplejidad: {cost}; con un solo documento no hay error estándar.",
    "cost none": "Perplejidad sin cambios.",
}
