# `make help` prints what follows `##`: what a target does, what a variable may hold. A default is followed by its `##`
# at once, as make would take a space between the two for a part of the value.

PYTHON        ?= python3## the interpreter that makes the environments, 3.11 or newer
VENV          ?= .venv## environment of the pipeline and the tests
OPTIMUM_VENV  ?= .venv-optimum## environment for EXPORTER=optimum
RAY_VENV      ?= .venv-ray## environment for RAY=
MODEL         ?= models/es-mini## checkpoint: folder or owner/name[@revision]
CORPUS        ?= corpus/es## text: file, folder or owner/name (CORPUS_CONFIG=, CORPUS_SPLIT=, CORPUS_COLUMN=)
RECIPES       ?= int8-dynamic int8-static## how to quantize: `python -m cuantiza recipes` lists them
RECIPE        ?= int8-dynamic## the one artifact of `generate` and `demo`
OUT           ?= artifacts## folder for artifacts
REPORTS       ?= reports## folder for reports
DIST          ?= dist## folder for `bundle` and `sbom`
OPSET         ?= 21## operator set of the ONNX files
EXPORTER      ?= graph## graph (ours) or optimum
QUANTIZE      ?=## more options of `python -m quantize`
EVAL          ?=## more options of `python -m eval`; LANG_REPORT=es for a Spanish report
PROMPT        ?= Me gusta mucho el futbol## what `generate` continues
PORT          ?= 8000## port of `demo`; BUILD=folder writes the page instead

# The folder of a model, named as cuantiza/core/inputs/checkpoints.py names it: its own name, or owner--name.
NAME      = $(if $(wildcard $(MODEL)/.),$(notdir $(realpath $(MODEL))),$(subst /,--,$(MODEL)))
ARTIFACT ?= $(OUT)/$(NAME)/$(RECIPE)
run       = $(VENV)/bin/python -m
ready     = $(VENV)/.stamp
corpus    = --corpus "$(CORPUS)" $(if $(CORPUS_CONFIG),--corpus-config "$(CORPUS_CONFIG)") \
            $(if $(CORPUS_SPLIT),--corpus-split "$(CORPUS_SPLIT)") $(if $(CORPUS_COLUMN),--corpus-column "$(CORPUS_COLUMN)")

.DEFAULT_GOAL := help
.PHONY: export quantize eval compare bundle generate demo sweep optimum ray js test lint clean help

export: $(ready) $(if $(filter optimum,$(EXPORTER)),optimum) ## checkpoint -> fp32 ONNX, verified against PyTorch
	@OPTIMUM_PYTHON="$(OPTIMUM_VENV)/bin/python" $(run) export --model "$(MODEL)" --exporter "$(EXPORTER)" --opset "$(OPSET)" --output "$(OUT)"

quantize: export ## fp32 ONNX -> one artifact for each of RECIPES=
	@$(run) quantize --model "$(MODEL)" --recipes $(RECIPES) --output "$(OUT)" $(corpus) $(QUANTIZE)

eval: quantize ## artifacts -> a report of their quality, size and speed
	@$(run) eval --model "$(MODEL)" --recipes fp32 $(RECIPES) --artifacts "$(OUT)" --output "$(REPORTS)" $(if $(LANG_REPORT),--language "$(LANG_REPORT)") $(corpus) $(EVAL)

compare: $(ready) ## is HEAD= worse than BASE= (folders of artifacts, or reports)? ARGS= are more options
	@$(run) cuantiza compare "$(BASE)" "$(HEAD)" $(ARGS)

bundle: RECIPES = int8-dynamic int4-weight fp16
# The report goes to a folder of its own, so that the one of other recipes stays.
bundle: override REPORTS := $(REPORTS)/bundle
bundle: .bundle-names eval ## artifacts -> a folder for the Hugging Face Hub with a model card, in DIST=
	@$(run) cuantiza.bundle --model "$(MODEL)" --recipes $(RECIPES) --artifacts "$(OUT)" --reports "$(REPORTS)" --output "$(DIST)"

# What a bundle cannot hold is told before anything is measured. No file has this name, so it is asked each time.
.bundle-names: $(ready)
	@$(run) cuantiza.bundle --recipes $(RECIPES) --names > /dev/null

# `generate` and `demo` build their artifact where it is missing.
generate demo: RECIPES = $(RECIPE)
# The prompt travels through the environment, since it may hold quotes and dollar signs.
generate: export PROMPT := $(PROMPT)
generate: $(if $(wildcard $(ARTIFACT)/manifest.json),$(ready),quantize) ## continue PROMPT= in the terminal; GENERATE="--top-k 50 --seed 1"
	@$(run) cuantiza.generate --artifact "$(ARTIFACT)" --prompt "$$PROMPT" $(GENERATE)

demo: js $(if $(wildcard $(ARTIFACT)/manifest.json),$(ready),quantize) ## a page that continues text in the browser
	@$(run) cuantiza.demo --artifact "$(ARTIFACT)" --port "$(PORT)" $(if $(BUILD),--build "$(BUILD)")

sweep: $(if $(RAY),ray,$(ready)) ## a grid of MODELS=, RECIPES= and CORPORA=, on a cluster with RAY=auto or host:port; SWEEP= for more options
	@$(if $(RAY),$(RAY_VENV),$(VENV))/bin/python -m cuantiza.sweep --models $(or $(MODELS),"$(MODEL)") --recipes $(RECIPES) --corpora $(or $(CORPORA),"$(CORPUS)") \
	  $(if $(RAY),--ray "$(RAY)") --work "$(OUT)/sweep" --output "$(REPORTS)/sweep" $(SWEEP)

# The recipe passes the file of pins, and an environment to stand on, whose packages are not installed again.
$(VENV)/.stamp: setup/default.txt
$(OPTIMUM_VENV)/.stamp: setup/optimum.txt
$(RAY_VENV)/.stamp: setup/ray.txt $(VENV)/.stamp
%/.stamp: setup/make_env.py pyproject.toml
	@$(PYTHON) $< "$(@D)" $(filter %.txt,$^) $(patsubst %/.stamp,"%",$(filter %/.stamp,$^))

optimum: $(OPTIMUM_VENV)/.stamp ## the environment for EXPORTER=optimum
ray: $(RAY_VENV)/.stamp ## the environment of the machines of a Ray cluster
js: js/node_modules/.stamp ## the packages of the browser page

js/node_modules/.stamp: js/package.json js/package-lock.json
	@cd js && npm ci --ignore-scripts --no-audit --no-fund && touch node_modules/.stamp

test: $(ready) ## the tests; TESTS=tests/quantize for some of them
	@$(run) pytest $(TESTS)

lint: $(ready) ## linter, format, import rules and types
	@$(run) ruff check .
	@$(run) ruff format --check .
	@$(VENV)/bin/python setup/check_tree.py imports types

clean: ## remove artifacts, reports and caches
	rm -rf artifacts reports build .pytest_cache .ruff_cache

help: ## this list
	@echo 'make export quantize eval    the whole pipeline on the embedded model; sets itself up'; echo
	@awk -F ' *## ' 'FNR == 1 && NR > 1 {print "\nFor maintainers, in " FILENAME ":"} \
	  /^[a-z-]+:.* ## / {sub(/:.*/, "", $$1); printf "make %-15s %s\n", $$1, $$2} \
	  /^[A-Z_]+ *\?=.*## / {sub(/ *\?= */, "=", $$1); variables = variables sprintf("%-34s %s\n", $$1, $$2)} \
	  END {printf "\nVariables and their defaults, as in make eval MODEL=owner/name:\n%s", variables}' $(MAKEFILE_LIST)

# The pipeline works in a copy that has no lab/.
-include lab/lab.mk
