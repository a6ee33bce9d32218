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
        "tradeoff_note": "Lower and further left is better; the larger a dot, the more tokens a second it decodes. The vertical "
        "scale is linear near zero and logarithmic beyond; bars are ± one standard error.",
        "latency": "Latency by context length",
        "latency_note": "Milliseconds to decode one token after a context of that length, batch of 1. Line: median. Band: 10th "
        "to 90th percentile.",
        "dashed": "Dashed: PyTorch.",
        "layers": "Quantization error by layer",
        "layers_note": "How far each layer's attention keys are from the baseline's: ‖difference‖ / ‖keys‖ over 128 tokens of "
        "the text. What has no error is not drawn.",
        "texts": "The same prompt, continued",
        "texts_note": "Greedy decoding. Marked: words that differ from the baseline's.",
        "protocols": "Other protocols",
        "method": "How it was measured",
        "environment": "Environment",
        "artifact": "artifact",
        "size": "MB",
        "size_axis": "size, MB",
        "ratio": "× {first}",
        "perplexity": "perplexity",
        "delta": "Δ ln ppl",
        "delta_axis": "Δ ln perplexity",
        "kl": "KL, nats",
        "same_top": "same top",
        "bits": "bits/byte",
        "prefill": "prefill {at}, ms",
        "decode": "decode @{at}, ms",
        "load": "load, ms",
        "peak": "peak, MB",
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
        "tradeoff_note": "Mejor cuanto más abajo y más a la izquierda; cuanto mayor es el punto, más tokens por segundo decodifica. "
        "La escala vertical es lineal cerca de cero y logarítmica más allá; las barras son ± un error estándar.",
        "latency": "Latencia según la longitud del contexto",
        "latency_note": "Milisegundos para decodificar un token tras un contexto de esa longitud, con un lote de 1. Línea: "
        "mediana. Banda: del percentil 10 al 90.",
        "dashed": "Línea discontinua: PyTorch.",
        "layers": "Error de cuantización por capa",
        "layers_note": "Cuánto se apartan las claves de atención de cada capa de las de la referencia: ‖diferencia‖ / ‖claves‖ "
        "en 128 tokens del texto. Lo que no tiene error no se dibuja.",
        "texts": "Continuaciones del mismo prompt",
        "texts_note": "Decodificación voraz: siempre el token más probable. Marcadas: las palabras que difieren de las de la "
        "referencia.",
        "protocols": "Otros protocolos",
        "method": "Cómo se midió",
        "environment": "Entorno",
        "artifact": "artefacto",
        "size": "MB",
        "size_axis": "tamaño, MB",
        "ratio": "× {first}",
        "perplexity": "perplejidad",
        "delta": "Δ ln ppl",
        "delta_axis": "Δ ln perplejidad",
        "kl": "KL, nats",
        "same_top": "mismo token",
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
        "tokens_scored": "tokens evaluados",
        "documents": "documentos",
        "of": "de",
    },
}
METHOD = {
    "en": (
        "Quality: whole documents, each after one start token, in windows of at most {window} tokens; every token is scored "
        "once. Differences are paired with {first} token by token; ± is one standard error over documents.",
        "Latency (rounds: {rounds}, threads: {threads}, batch: 1): each artifact in a fresh process with nothing else loaded; in "
        "brackets the speed-up over {first}, the median of the rounds. Tokenizing and sampling are not timed.",
        "Size: every file that inference needs. Peak: the largest resident set of the process that measured the latency.",
    ),
    "es": (
        "Calidad: documentos enteros, cada uno tras un token inicial, en ventanas de {window} tokens como máximo; cada token se "
        "evalúa una sola vez. Las diferencias se toman token a token frente a {first}; ± es un error estándar entre documentos.",
        "Latencia (rondas: {rounds}, hilos: {threads}, lote: 1): cada artefacto en un proceso nuevo, sin nada más cargado; entre "
        "paréntesis, la aceleración respecto a {first}, mediana de las rondas. No se cronometran ni la tokenización ni el muestreo.",
        "Tamaño: todos los archivos que necesita la inferencia. Pico: la mayor memoria residente del proceso que midió la latencia.",
    ),
}
