"""The words of the report's pages, in English and Spanish. The titles of columns are in columns.py."""

from __future__ import annotations

LABELS = {
    "en": {
        "conclusion": "Conclusion",
        "artifacts": "Every artifact",
        "tradeoff": "Size, quality and speed",
        "tradeoff_note": "Lower and further left is better; the larger a mark, the more tokens a second it decodes. The vertical "
        "scale is linear near zero and logarithmic beyond; bars are ± one standard error. Marks that would cover each other are "
        "drawn side by side.",
        "latency": "Latency by context length",
        "latency_note": "Milliseconds to decode one token after a context of that length, batch of 1. Line: median. Band: 10th "
        "to 90th percentile.",
        "dashed": "Dashed: PyTorch.",
        "layers": "Quantization error by layer",
        "layers_note": "How far each layer's attention keys are from the baseline's: ‖difference‖ / ‖keys‖ over 128 tokens of "
        "the text. What has no error is not drawn.",
        "texts": "The same prompt, continued",
        "texts_note": "Greedy decoding. Marked: words that differ from the baseline's.",
        "texts_same": "Greedy decoding: two rows with the same text chose the same likeliest token at every step.",
        "modules": "`{name}`: PyTorch quantized {some} of {all} modules with weights.",
        "protocols": "Other protocols",
        "protocols_note": "The table above follows lm-evaluation-harness: {documents} documents, each after one start token, "
        "in windows of at most {window} tokens; every token is scored once, and the last window of a document is extended to "
        "the left. Words are split at white space.",
        "llama_note": "llama.cpp's protocol: the documents joined by an empty line, {windows} disjoint windows of {window} "
        "tokens without a start token; the second half of each window is scored, {scored} tokens in all. Its ± is the one that "
        "llama.cpp prints: the standard error over single tokens, as if they were independent. Elsewhere ± is over documents.",
        "words_note": "Last words: the share of {words} sentences whose last word is the likeliest one, each of its tokens, after "
        "all that precedes it in the window. In brackets: the words that {first} misses and the row has right (+), and the reverse "
        "(−). p is the probability of flips at least as uneven by chance (McNemar's exact test, two-sided).",
        "llama_short": "llama.cpp's protocol scores nothing here: the text is shorter than its windows of {window} tokens, or they are too "
        "short.",
        "transformers_note": "The windows of transformers' documentation on perplexity: the same text as one stream without a start "
        "token; {windows} windows of {window} tokens, {stride} apart, each scored on what follows the one before, {scored} tokens. "
        "In brackets: the rise over {first}, paired; ± is one standard error over windows.",
        "paper_short": "The protocol `{name}` scores nothing here: the text is shorter than one of its windows, or they are too short.",
        "gptq_note": "GPTQ's windows: the same stream in {windows} full windows of {window} tokens, one after the other, scored on "
        "all but the first token of each, {scored} tokens.",
        "shapes": "All latencies",
        "shapes_note": "Milliseconds, median / 90th percentile; batch of 1. “prefill n” is n tokens into an empty cache, up to "
        "the logits of the last one; “decode @n” is one more token after n.",
        "caption": "{cpu}, {threads} threads, onnxruntime {onnxruntime}, {rounds} interleaved rounds; times are p50, in brackets the "
        "speed-up over {first} (median of rounds); ± is one standard error over documents; Δ and KL are paired with {first}.",
        "method": "How it was measured",
        "environment": "Environment",
        "size_axis": "size, MB",
        "delta_axis": "Δ ln perplexity",
        "context": "tokens of context",
        "ms": "ms per token",
        "layer": "layer",
        "error": "relative error",
        "corpus": "corpus",
        "processor": "processor",
        "instructions": "instruction sets",
        "session": "ONNX Runtime's session",
        "unknown": "not known",
        "test": "test",
        "threads": "threads",
        "system": "system",
        "memory": "memory",
        "left_out": "{name} is left out, as it could not be measured: {reason}",
        "limited": ", limited to {limit} here",
        "rounds": "interleaved rounds",
        "versions": "versions",
        "tokens_scored": "tokens scored",
        "documents": "documents",
        "of": "of",
        "by_line": "each line a document",
        "by_article": "each article a document",
        "joined": "joined to one text",
    },
    "es": {
        "conclusion": "Conclusión",
        "artifacts": "Todos los artefactos",
        "tradeoff": "Tamaño, calidad y velocidad",
        "tradeoff_note": "Mejor cuanto más abajo y más a la izquierda; cuanto mayor es la marca, más tokens por segundo decodifica. "
        "La escala vertical es lineal cerca de cero y logarítmica más allá; las barras son ± un error estándar. Las marcas que se "
        "taparían se dibujan una al lado de otra.",
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
        "texts_same": "Decodificación voraz: dos filas con el mismo texto eligieron el mismo token más probable en cada paso.",
        "modules": "`{name}`: PyTorch cuantizó {some} de {all} módulos con pesos.",
        "protocols": "Otros protocolos",
        "protocols_note": "La tabla de arriba sigue a lm-evaluation-harness: {documents} documentos, cada uno tras un token "
        "inicial, en ventanas de {window} tokens como máximo; cada token se evalúa una sola vez y la última ventana de un "
        "documento se amplía hacia la izquierda. Las palabras se separan por espacios en blanco.",
        "llama_note": "El protocolo de llama.cpp: los documentos unidos por una línea vacía, {windows} ventanas disjuntas de "
        "{window} tokens sin token inicial; se evalúa la segunda mitad de cada ventana, {scored} tokens en total. Su ± es el que "
        "imprime llama.cpp: el error estándar entre tokens sueltos, como si fueran independientes. En el resto, ± es entre "
        "documentos.",
        "words_note": "Últimas palabras: en qué parte de {words} oraciones la última palabra es la más probable, en todos sus "
        "tokens, tras todo lo que la precede en la ventana. Entre paréntesis: las palabras que {first} falla y la fila acierta (+), y "
        "al revés (−). p es la probabilidad de cambios al menos tan desiguales por azar (prueba exacta de McNemar, bilateral).",
        "llama_short": "El protocolo de llama.cpp no evalúa nada aquí: el texto es más corto que sus ventanas de {window} tokens, o estas "
        "son demasiado cortas.",
        "transformers_note": "Las ventanas de la documentación de transformers sobre perplejidad: el mismo texto, seguido y sin token "
        "inicial; {windows} ventanas de {window} tokens, una cada {stride}, y de cada una se evalúa lo que sigue a la anterior, "
        "{scored} tokens. Entre paréntesis, el aumento respecto a {first}, pareado; ± es un error estándar entre ventanas.",
        "paper_short": "El protocolo `{name}` no evalúa nada aquí: el texto es más corto que una de sus ventanas, o estas son demasiado cortas.",
        "gptq_note": "Las ventanas de GPTQ: el mismo texto en {windows} ventanas llenas de {window} tokens, una tras otra; de cada una "
        "se evalúa todo menos el primer token, {scored} tokens.",
        "shapes": "Todas las latencias",
        "shapes_note": "Milisegundos, mediana / percentil 90; lote de 1. «Lectura de n» es el prefill: n tokens a partir de una "
        "caché vacía, hasta los logits del último. «Token tras n» es un paso de decode: un token más después de n.",
        "caption": "{cpu}, {threads} hilos, onnxruntime {onnxruntime}, {rounds} rondas intercaladas; los tiempos son medianas; entre "
        "paréntesis, la aceleración respecto a {first} (mediana de las rondas); ± es un error estándar entre documentos; Δ y KL "
        "se toman respecto a {first}.",
        "method": "Cómo se midió",
        "environment": "Entorno",
        "size_axis": "tamaño, MB",
        "delta_axis": "Δ ln perplejidad",
        "context": "tokens de contexto",
        "ms": "ms por token",
        "layer": "capa",
        "error": "error relativo",
        "corpus": "corpus",
        "processor": "procesador",
        "instructions": "juegos de instrucciones",
        "session": "sesión de ONNX Runtime",
        "unknown": "no se sabe",
        "test": "prueba",
        "threads": "hilos",
        "system": "sistema",
        "memory": "memoria",
        "left_out": "Falta {name}, que no se pudo medir: {reason}",
        "limited": ", limitado aquí a {limit}",
        "rounds": "rondas intercaladas",
        "versions": "versiones",
        "tokens_scored": "tokens evaluados",
        "documents": "documentos",
        "of": "de",
        "by_line": "cada línea es un documento",
        "by_article": "cada artículo es un documento",
        "joined": "unido en un solo texto",
    },
}
METHOD = {
    "en": (
        "Quality: whole documents (but for a long last one), each after one start token, in windows of at most {window} tokens; every token is scored "
        "once. Differences are paired with {first} token by token; ± is one standard error over documents.",
        "Latency (rounds: {rounds}, threads: {threads}, batch: 1): each artifact in a fresh process with nothing else loaded; in "
        "brackets the speed-up over {first}, the median of the rounds. Tokenizing and sampling are not timed.",
        "Size: every file that inference needs. Peak: the largest resident set of the process that measured the latency.",
    ),
    "es": (
        "Calidad: documentos enteros (salvo uno último muy largo), cada uno tras un token inicial, en ventanas de {window} tokens como máximo; cada token se "
        "evalúa una sola vez. Las diferencias se toman token a token frente a {first}; ± es un error estándar entre documentos.",
        "Latencia (rondas: {rounds}, hilos: {threads}, lote: 1): cada artefacto en un proceso nuevo, sin nada más cargado; entre "
        "paréntesis, la aceleración respecto a {first}, mediana de las rondas. No se cronometran ni la tokenización ni el muestreo.",
        "Tamaño: todos los archivos que necesita la inferencia. Pico: la mayor memoria residente del proceso que midió la latencia.",
    ),
}
