"""Numbers and words of the pages, in English and Spanish."""

from __future__ import annotations

import math

_SPACE = "\N{NARROW NO-BREAK SPACE}"


def number(value: float, digits: int, language: str) -> str:
    """`value` with so many decimals and thousands apart, by the custom of `language` (en, es)."""
    text = f"{round(value, digits) + 0.0:,.{digits}f}"
    if language == "es":
        whole, _, decimals = text.partition(".")
        # Four digits stay together in Spanish (Ortografía de la lengua española, 2010).
        whole = whole.replace(",", _SPACE if len(whole.lstrip("-").replace(",", "")) > 4 else "")
        text = whole + (f",{decimals}" if decimals else "")
    return text.replace("-", "\N{MINUS SIGN}")


def significant(value: float, language: str, figures: int = 3) -> str:
    """`value` with so many significant figures."""
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return number(value, max(0, figures - 1 - magnitude), language)


def percent(value: float, language: str, digits: int = 2) -> str:
    """A share as a percentage, with its sign where it is a change."""
    return f"{number(100 * value, digits, language)}{_SPACE if language == 'es' else ' '}%"


def signed_percent(value: float, language: str, digits: int = 2) -> str:
    text = percent(value, language, digits)
    return text if text.startswith("\N{MINUS SIGN}") or round(100 * value, digits) == 0 else f"+{text}"


LABELS = {
    "en": {
        "conclusion": "Conclusion",
        "artifacts": "Every artifact",
        "tradeoff": "Size, quality and speed",
        "tradeoff_note": "Down and to the left is better; the larger the dot, the faster a token is decoded. The scale of "
        "Δ ln perplexity is linear near zero and logarithmic beyond; bars are one standard error.",
        "latency": "Latency by context length",
        "latency_note": "Milliseconds to decode one token behind a context, batch of 1: median, and the band from the 10th "
        "to the 90th percentile.",
        "layers": "Quantization error by layer",
        "layers_note": "How far each layer's keys are from the baseline's: ‖difference‖ / ‖keys‖ over 128 tokens of the text.",
        "texts": "The same prompt, continued",
        "texts_note": "Greedy. Marked: where a row's text is not the baseline's.",
        "protocols": "Other protocols",
        "method": "How it was measured",
        "environment": "Environment",
        "artifact": "artifact",
        "size": "MB",
        "ratio": "× {first}",
        "perplexity": "perplexity",
        "delta": "Δ ln ppl",
        "kl": "KL, nats",
        "same_top": "same top",
        "bits": "bits/byte",
        "prefill": "prefill {at}, ms",
        "decode": "decode @{at}, ms",
        "load": "load, ms",
        "peak": "peak MB",
        "baseline": "baseline",
        "context": "tokens of context",
        "ms": "ms per token",
        "layer": "layer",
        "error": "relative error",
        "word": "word perplexity",
        "byte": "byte perplexity",
        "llama": "llama.cpp perplexity",
        "corpus": "corpus",
        "processor": "processor",
        "threads": "threads",
        "system": "system",
        "memory": "memory",
        "rounds": "interleaved rounds",
        "versions": "versions",
        "tokens_scored": "tokens scored",
        "documents": "documents",
        "of": "of",
    },
    "es": {
        "conclusion": "Conclusión",
        "artifacts": "Todos los artefactos",
        "tradeoff": "Tamaño, calidad y velocidad",
        "tradeoff_note": "Cuanto más abajo y a la izquierda, mejor; cuanto mayor el punto, más rápido se descodifica un token. "
        "La escala de Δ ln perplejidad es lineal cerca de cero y logarítmica más allá; las barras son un error estándar.",
        "latency": "Latencia según la longitud del contexto",
        "latency_note": "Milisegundos para descodificar un token detrás de un contexto, lote de 1: mediana, y banda del "
        "percentil 10 al 90.",
        "layers": "Error de cuantización por capa",
        "layers_note": "Cuánto se apartan las claves de cada capa de las de la referencia: ‖diferencia‖ / ‖claves‖ en "
        "128 tokens del texto.",
        "texts": "El mismo comienzo, continuado",
        "texts_note": "Siempre el token más probable. Marcado: donde el texto no es el de la referencia.",
        "protocols": "Otros protocolos",
        "method": "Cómo se midió",
        "environment": "Entorno",
        "artifact": "artefacto",
        "size": "MB",
        "ratio": "× {first}",
        "perplexity": "perplejidad",
        "delta": "Δ ln ppl",
        "kl": "KL, nats",
        "same_top": "mismo 1.º",
        "bits": "bits/byte",
        "prefill": "prefill {at}, ms",
        "decode": "decode @{at}, ms",
        "load": "carga, ms",
        "peak": "pico, MB",
        "baseline": "referencia",
        "context": "tokens de contexto",
        "ms": "ms por token",
        "layer": "capa",
        "error": "error relativo",
        "word": "perplejidad por palabra",
        "byte": "perplejidad por byte",
        "llama": "perplejidad de llama.cpp",
        "corpus": "corpus",
        "processor": "procesador",
        "threads": "hilos",
        "system": "sistema",
        "memory": "memoria",
        "rounds": "rondas intercaladas",
        "versions": "versiones",
        "tokens_scored": "tokens puntuados",
        "documents": "documentos",
        "of": "de",
    },
}
METHOD = {
    "en": (
        "Quality: whole documents behind one start token, windows of at most {window} tokens, every token scored once; "
        "differences are paired with {first} token by token, and ± is one standard error over documents.",
        "Latency: {rounds} rounds, each artifact in a fresh process with nothing else loaded, {threads} threads, batch of 1; "
        "in brackets the speed-up over {first} within a round, as a median. Tokenizing and sampling are not timed.",
        "Size: every file that inference needs. Peak: the largest resident set of the process that measured the latency.",
    ),
    "es": (
        "Calidad: documentos enteros detrás de un token inicial, ventanas de {window} tokens como mucho, cada token puntuado "
        "una vez; las diferencias están emparejadas con {first} token a token, y ± es un error estándar entre documentos.",
        "Latencia: {rounds} rondas, cada artefacto en un proceso nuevo y sin nada más cargado, {threads} hilos, lote de 1; entre "
        "paréntesis, cuántas veces más rápido que {first} dentro de una ronda (mediana). No se cronometra ni la tokenización ni el muestreo.",
        "Tamaño: todos los ficheros que necesita la inferencia. Pico: la mayor memoria residente del proceso que midió la latencia.",
    ),
}
