# make export quantize eval      the whole pipeline on the embedded model; sets itself up
# make test                      the tests
#
# make optimum                   the second environment, for EXPORTER=optimum
# make peers                     the environments of the other libraries that `make bench` compares with
# make bench                     speed, size and memory beside them, in reports/bench; BENCH=full adds gpt2-medium,
#                                BENCH_ARGS="--without-peers --rounds 5 ..." are options of `python -m lab.bench`
# make accuracy                  docs/accuracy.md anew; MODELS="FOLDER ..." and TEXT=file add to it
# make bundle                    dist/<model>: a folder for the Hugging Face Hub, with a card of the measured table
# make generate                  text in the terminal: PROMPT="..." RECIPE=int8-dynamic GENERATE="--top-k 50 --seed 1"
# make demo                      a page that continues text in the browser; RECIPE=..., PORT=8000, BUILD=folder
# make runtimes                  docs/runtimes.md: every artifact in every runtime that is installed or can be by pip and npm
# make emulation                 the same on other processors, by qemu-user: docs/runtimes-emulation.json
# make torture                   kills, full disks, flipped bits at many moments; TORTURE="--moments 20 --kinds kill"
# make fuzz                      10,000 broken files of every format; FUZZ="--cases 500 --formats ONNX"
# make compare                   BASE=... HEAD=..., reports or folders of artifacts: is anything worse than its budget?
# make sweep                     a grid, MODELS="..." RECIPES="..." CORPORA="..." -> reports/sweep; RAY=auto or host:port: on
#                                the machines of a Ray cluster, SWEEP="--tokens 4000 --threads 8 ..." are further options
# make ray                       the environment of those machines; sweep-speedup: what two of them are worth
# make chapters                  docs/es/cuantizacion.md and its English twin anew, with their figures
# make sbom | audit              what is installed, as CycloneDX, in dist/; known vulnerabilities of it
# make lint | clean              the linter | remove artifacts and reports
#
# MODEL=folder | owner/name[@revision]   CORPUS=file | folder | owner/name   RECIPES="int8-dynamic ort-static ..."

PYTHON  ?= python3
VENV    ?= .venv
OPTIMUM_VENV ?= .venv-optimum
RUNTIMES_VENV ?= .venv-runtimes
PEERS_VENV ?= .venv-peers
RAY_VENV ?= .venv-ray
RELEASE_VENV ?= .venv-release

MODEL   ?= models/es-mini
CORPUS  ?= corpus/es
RECIPES ?= int8-dynamic int8-static
OUT     ?= artifacts
REPORTS ?= reports
DIST    ?= dist
OPSET   ?= 21
EXPORTER ?= graph
QUANTIZE ?=
EVAL    ?=
BENCH   ?=
RECIPE  ?= int8-dynamic
# As cuantiza/core/inputs/checkpoints.py names the folder of a model: its own name, or owner--name.
NAME    = $(if $(wildcard $(MODEL)/.),$(notdir $(realpath $(MODEL))),$(subst /,--,$(MODEL)))
ARTIFACT ?= $(OUT)/$(NAME)/$(RECIPE)
PROMPT  ?= Me gusta mucho el futbol
PORT    ?= 8000
BENCH_ARGS ?=

run      = $(VENV)/bin/python -m
ready    = $(VENV)/.stamp
corpus   = --corpus "$(CORPUS)" $(if $(CORPUS_CONFIG),--corpus-config "$(CORPUS_CONFIG)") \
           $(if $(CORPUS_SPLIT),--corpus-split "$(CORPUS_SPLIT)") $(if $(CORPUS_COLUMN),--corpus-column "$(CORPUS_COLUMN)")

.PHONY: export quantize eval accuracy bench bundle chapters compare demo emulation torture runtimes runtimes-env fuzz generate js optimum peers ray sweep sweep-speedup sbom audit test lint clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

$(VENV)/.stamp: pyproject.toml setup/default.txt setup/make_env.py
	@$(PYTHON) setup/make_env.py "$(VENV)" setup/default.txt

$(OPTIMUM_VENV)/.stamp: pyproject.toml setup/optimum.txt setup/make_env.py
	@$(PYTHON) setup/make_env.py "$(OPTIMUM_VENV)" setup/optimum.txt

$(PEERS_VENV)/.stamp: pyproject.toml setup/peers.txt setup/make_env.py
	@CMAKE_ARGS="-DGGML_NATIVE=on" $(PYTHON) setup/make_env.py "$(PEERS_VENV)" setup/peers.txt

js: js/node_modules/.stamp

js/node_modules/.stamp: js/package.json js/package-lock.json
	@cd js && npm ci --ignore-scripts --no-audit --no-fund && touch node_modules/.stamp

$(RUNTIMES_VENV)/.stamp: pyproject.toml setup/runtimes.txt setup/make_env.py
	@$(PYTHON) setup/make_env.py "$(RUNTIMES_VENV)" setup/runtimes.txt

runtimes-env: $(RUNTIMES_VENV)/.stamp

$(RELEASE_VENV)/.stamp: pyproject.toml setup/release.txt setup/make_env.py
	@$(PYTHON) setup/make_env.py "$(RELEASE_VENV)" setup/release.txt

# Stands on the first one, which has all but Ray and what it brings.
$(RAY_VENV)/.stamp: pyproject.toml setup/ray.txt setup/make_env.py $(VENV)/.stamp
	@$(PYTHON) setup/make_env.py "$(RAY_VENV)" setup/ray.txt "$(VENV)"

# Each set of pins is an environment of its own.
sbom: $(RELEASE_VENV)/.stamp
	@mkdir -p "$(DIST)"
	@for pins in setup/*.txt; do \
	  $(RELEASE_VENV)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
	    -o "$(DIST)/sbom-$$(basename $$pins .txt).cdx.json" $$pins || exit; done
	@cd js && npm sbom --sbom-format cyclonedx --package-lock-only > "$(abspath $(DIST))/sbom-javascript.cdx.json"

# A package that the database does not answer for is a failure too.
audit: $(RELEASE_VENV)/.stamp
	@for pins in setup/*.txt; do \
	  $(RELEASE_VENV)/bin/pip-audit --strict --require-hashes --disable-pip --requirement $$pins || exit; done
	@cd js && npm audit --package-lock-only

optimum: $(OPTIMUM_VENV)/.stamp

peers: optimum $(PEERS_VENV)/.stamp

ray: $(RAY_VENV)/.stamp

export: $(ready) $(if $(filter optimum,$(EXPORTER)),optimum)
	@OPTIMUM_PYTHON="$(OPTIMUM_VENV)/bin/python" $(run) export --model "$(MODEL)" --exporter "$(EXPORTER)" --opset "$(OPSET)" --output "$(OUT)"

quantize: export
	@$(run) quantize --model "$(MODEL)" --recipes $(RECIPES) --output "$(OUT)" $(corpus) $(QUANTIZE)

eval: quantize
	@$(run) eval --model "$(MODEL)" --recipes fp32 $(RECIPES) --artifacts "$(OUT)" --output "$(REPORTS)" $(if $(LANG_REPORT),--language "$(LANG_REPORT)") $(corpus) $(EVAL)

accuracy: $(ready)
	@OPTIMUM_PYTHON="$(OPTIMUM_VENV)/bin/python" $(VENV)/bin/python -m lab.accuracy $(if $(MODELS),--models $(MODELS)) $(if $(TEXT),--text "$(TEXT)")

MATRIX = int8-dynamic int8-static int8-weight int4-weight fp16 bf16
runtimes: $(ready) runtimes-env optimum js
	@$(MAKE) quantize RECIPES="$(MATRIX) fp32-ort $(MATRIX:=-ort)" OUT="$(OUT)"
	@OPTIMUM_PYTHON="$(OPTIMUM_VENV)/bin/python" RUNTIMES_PYTHON="$(RUNTIMES_VENV)/bin/python" $(run) lab.matrix --model "$(MODEL)" --artifacts "$(OUT)"

emulation: $(ready)
	@$(run) lab.matrix.emulation --artifacts "$(OUT)/$(NAME)" $(EMULATION)

torture: $(ready)
	@$(VENV)/bin/python -m lab.faults $(TORTURE)

compare: $(ready)
	@$(run) cuantiza compare "$(BASE)" "$(HEAD)" $(ARGS)

chapters: $(ready)
	@$(MAKE) eval MODEL=models/es-mini CORPUS=corpus/es EXPORTER=graph QUANTIZE= EVAL= OUT="$(OUT)/chapters" REPORTS="$(REPORTS)/chapters" \
	  RECIPES="int8-dynamic int8-static int8-weight int4-weight fp16 bf16"
	@$(VENV)/bin/python -m lab.chapters --artifacts "$(OUT)/chapters/es-mini" --report "$(REPORTS)/chapters/es-mini/report.json"

bench: $(ready)
	@OPTIMUM_PYTHON="$(OPTIMUM_VENV)/bin/python" PEERS_PYTHON="$(PEERS_VENV)/bin/python" $(run) lab.bench \
	  --shapes es-mini gpt2 $(if $(filter full,$(BENCH)),gpt2-medium) --work "$(OUT)/bench" --output "$(REPORTS)/bench" $(BENCH_ARGS)

# Unless RECIPES= is given.
bundle: RECIPES = int8-dynamic int4-weight fp16
# A report of its own: that of other recipes stays.
bundle: override REPORTS := $(REPORTS)/bundle
bundle: eval
	@$(run) cuantiza.bundle --model "$(MODEL)" --recipes $(RECIPES) --artifacts "$(OUT)" --reports "$(REPORTS)" --output "$(DIST)"

# What is missing of these is built, unless RECIPES= is given.
generate demo: RECIPES = $(RECIPE)
# Through the environment, since a prompt may hold anything.
generate: export PROMPT := $(PROMPT)
generate: $(if $(wildcard $(ARTIFACT)/manifest.json),$(ready),quantize)
	@$(run) cuantiza.generate --artifact "$(ARTIFACT)" --prompt "$$PROMPT" $(GENERATE)

demo: js $(if $(wildcard $(ARTIFACT)/manifest.json),$(ready),quantize)
	@$(run) cuantiza.demo --artifact "$(ARTIFACT)" --port "$(PORT)" $(if $(BUILD),--build "$(BUILD)")

sweep: $(if $(RAY),ray,$(ready))
	@$(if $(RAY),$(RAY_VENV),$(VENV))/bin/python -m cuantiza.sweep --models $(or $(MODELS),"$(MODEL)") --recipes $(RECIPES) --corpora $(or $(CORPORA),"$(CORPUS)") \
	  $(if $(RAY),--ray "$(RAY)") --work "$(OUT)/sweep" --output "$(REPORTS)/sweep" $(SWEEP)

sweep-speedup: ray
	@$(RAY_VENV)/bin/python -m lab.speedup $(SPEEDUP)

fuzz: $(ready)
	@$(run) lab.fuzz $(FUZZ)

test: $(ready)
	@$(run) pytest $(TESTS)

lint: $(ready)
	@$(run) ruff check .
	@$(run) ruff format --check .

clean:
	rm -rf artifacts reports .pytest_cache .ruff_cache
