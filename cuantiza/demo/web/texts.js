// What the page says, in both languages. Functions get the page's numbers already formatted.

export const TEXTS = {
  es: {
    title: "Continúa el texto",
    lead: "Un modelo de lenguaje en español que se ejecuta en este navegador. Lo que escribes no sale de tu equipo.",
    prompt: "Comienzo",
    examples: "Ejemplos",
    go: "Continuar",
    stop: "Parar",
    download: "Descarga",
    settings: "Ajustes",
    length: "Longitud, en tokens",
    temperature: "Temperatura",
    temperatureHelp: "Con 0, siempre el token más probable.",
    topK: "Top-k",
    topKHelp: "Entre cuántos tokens se sortea.",
    seed: "Semilla",
    seedHelp: "La misma semilla da el mismo texto.",
    licenses: "Licencias",
    result: "Continuación",
    empty: "Aquí aparecerá el texto, token a token.",
    perSecond: "tokens por segundo (mediana)",
    first: "ms hasta el primer token",
    tokens: "tokens",
    beforehand: (model, runtime) => `La primera vez descarga ${model} MB del modelo y ${runtime} MB de ONNX Runtime.`,
    amount: (loaded, total) => `${loaded} de ${total} MB`,
    starting: "Preparando el modelo…",
    writing: "Escribiendo…",
    length_reached: "Listo.",
    end_reached: "El modelo dio el texto por terminado.",
    stopped: "Parado.",
    dropped: (count) => ` El comienzo no cabe en la ventana del modelo: se ignoraron sus primeros ${count} tokens.`,
    about: (model, recipe, threads) =>
      `Modelo ${model}, receta ${recipe}. ONNX Runtime Web (WebAssembly)` +
      (threads === null ? "." : threads === 1 ? ", 1 hilo." : `, ${threads} hilos.`),
    noSimd:
      "Este navegador no admite WebAssembly SIMD, que el modelo necesita. " +
      "Usa una versión actual de Chrome, Edge, Firefox o Safari.",
    failed: (detail) =>
      `El modelo no se pudo cargar o ejecutar (${detail}). Comprueba la conexión y vuelve a intentarlo.`,
  },
  en: {
    title: "Continue the text",
    lead: "A Spanish language model that runs in this browser. What you write does not leave your machine.",
    prompt: "Beginning",
    examples: "Examples",
    go: "Continue",
    stop: "Stop",
    download: "Download",
    settings: "Settings",
    length: "Length, in tokens",
    temperature: "Temperature",
    temperatureHelp: "At 0, always the likeliest token.",
    topK: "Top-k",
    topKHelp: "How many tokens it draws from.",
    seed: "Seed",
    seedHelp: "The same seed gives the same text.",
    licenses: "Licences",
    result: "Continuation",
    empty: "The text will appear here, token by token.",
    perSecond: "tokens per second (median)",
    first: "ms to the first token",
    tokens: "tokens",
    beforehand: (model, runtime) =>
      `The first time, it downloads ${model} MB of model and ${runtime} MB of ONNX Runtime.`,
    amount: (loaded, total) => `${loaded} of ${total} MB`,
    starting: "Preparing the model…",
    writing: "Writing…",
    length_reached: "Done.",
    end_reached: "The model ended the text.",
    stopped: "Stopped.",
    dropped: (count) => ` The beginning does not fit the model's window: its first ${count} tokens were ignored.`,
    about: (model, recipe, threads) =>
      `Model ${model}, recipe ${recipe}. ONNX Runtime Web (WebAssembly)` +
      (threads === null ? "." : threads === 1 ? ", 1 thread." : `, ${threads} threads.`),
    noSimd:
      "This browser lacks WebAssembly SIMD, which the model needs. " +
      "Use a current version of Chrome, Edge, Firefox or Safari.",
    failed: (detail) => `The model could not be loaded or run (${detail}). Check the connection and try again.`,
  },
};
