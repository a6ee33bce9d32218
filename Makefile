# `make help` prints what follows `##`: what a target does, what a variable may hold. A default is followed by its `##`
# at once, as make would take a space between the two for a part of the value.

# What a user gives arrives as it was typed: make would expand it, and run `$(shell …)` in it, so each variable that
# comes from the command line or from the environment is first fixed to its own text.
GIVEN  = PYTHON VENV OPTIMUM_VENV RAY_VENV MODEL CORPUS CORPUS_BY CORPUS_JOIN CORPUS_CONFIG CORPUS_SPLIT CORPUS_COLUMN RECIPES RECIPE \
         ARTIFACT OUT REPORTS DIST OPSET EXPORTER QUANTIZE EVAL LANG_REPORT PROMPT GENERATE PORT BUILD BASE HEAD ARGS MODELS \
         CORPORA RAY SWEEP TESTS
fix    = $(foreach name,$(1),$(if $(filter $(2),$(origin $(name))),$(eval override $(name) := $$(value $(name)))))
$(call fix,$(.VARIABLES),command)
$(call fix,$(GIVEN),environment)
# Each line of a recipe is a shell of its own, so that only a prompt may have several.
define line-end


endef
$(foreach name,$(filter-out PROMPT,$(GIVEN)),$(if $(findstring $(line-end),$(value $(name))),$(error $(name)= has several lines; write one)))

PYTHON        ?= python3## the interpreter that makes the environments, 3.11 or newer
VENV          ?= .venv## environment of the pipeline and the tests
OPTIMUM_VENV  ?= .venv-optimum## environment for EXPORTER=optimum
RAY_VENV      ?= .venv-ray## environment for RAY=
MODEL         ?= models/es-mini## checkpoint: folder or owner/name[@revision]
CORPUS        ?= corpus/es## text: file, folder or owner/name (CORPUS_CONFIG=, CORPUS_SPLIT=, CORPUS_COLUMN=, CORPUS_BY=line, CORPUS_JOIN=1); self: the model writes what calibrates it
RECIPES       ?= int8-dynamic int8-static int8-dynamic-ort## how to quantize: `python -m cuantiza recipes` lists them
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

# One word of the shell that stands for a text, whatever the text holds.
quote     = '$(subst ','\'',$(1))'
option    = $(if $(2),$(1)=$(call quote,$(2)))
# The folder of a model, named as cuantiza/core/inputs/checkpoints.py names it: its own name, or owner--name.
NAME      = $(shell unset CDPATH; if cd -- $(call quote,$(MODEL)) 2> /dev/null; then basename "$$(pwd -P)"; \
                    else printf %s $(call quote,$(MODEL)) | sed 's,/,--,g'; fi)
run       = $(VENV)/bin/python -m
ready     = $(VENV)/.stamp
model     = --model=$(call quote,$(MODEL))
# RECIPE=mine.json makes an artifact named mine, and a manifest one of its own name, as Python says.
named     = $(if $(findstring .json,$(RECIPE)),$(shell $(VENV)/bin/python -c 'import sys; from cuantiza.core.store.artifact import \
            name_by; print(name_by(sys.argv[1]))' $(call quote,$(RECIPE)) 2> /dev/null),$(RECIPE))
artifact  = $(call quote,$(or $(ARTIFACT),$(OUT)/$(NAME)/$(named)))
artifacts = --artifacts=$(call quote,$(OUT))
corpus    = --corpus=$(call quote,$(CORPUS))$(reading)
reading   = $(call option, --corpus-config,$(CORPUS_CONFIG))$(call option, --corpus-split,$(CORPUS_SPLIT))$(call option, \
            --corpus-column,$(CORPUS_COLUMN))$(call option, --corpus-by,$(CORPUS_BY))$(call option, \
            --corpus-join,$(CORPUS_JOIN))

.DEFAULT_GOAL := help
.PHONY: export quantize eval compare bundle generate demo sweep optimum ray js test lint clean help

export: $(ready) $(if $(filter optimum,$(EXPORTER)),optimum) ## checkpoint -> fp32 ONNX, verified against PyTorch
	@OPTIMUM_PYTHON="$(OPTIMUM_VENV)/bin/python" $(run) export $(model) --exporter=$(call quote,$(EXPORTER)) --opset=$(call quote,$(OPSET)) --output=$(call quote,$(OUT))

quantize: export ## fp32 ONNX -> one artifact for each of RECIPES=
	@$(run) quantize $(model) --recipes $(RECIPES) --output=$(call quote,$(OUT)) $(corpus) $(QUANTIZE)

eval: quantize ## artifacts -> a report of their quality, size and speed
	@$(run) eval $(model) --recipes fp32 $(RECIPES) $(artifacts) --output=$(call quote,$(REPORTS)) $(call option,--language,$(LANG_REPORT)) $(corpus) $(EVAL)

compare: $(ready) ## is HEAD= worse than BASE= (folders of artifacts, or reports)? ARGS= are more options
	@$(run) cuantiza compare $(call quote,$(BASE)) $(call quote,$(HEAD)) $(ARGS)

bundle: override RECIPES := $(if $(filter file,$(origin RECIPES)),int8-dynamic int4-weight fp16,$(RECIPES))
# The report goes to a folder of its own, so that the one of other recipes stays.
bundle: override REPORTS := $(REPORTS)/bundle
bundle: .bundle-names eval ## artifacts -> a folder for the Hugging Face Hub with a model card, in DIST=
	@$(run) cuantiza.bundle $(model) --recipes $(RECIPES) $(artifacts) --reports=$(call quote,$(REPORTS)) --output=$(call quote,$(DIST))

# What a bundle cannot hold is told before anything is measured. No file has this name, so it is asked each time.
.bundle-names: $(ready)
	@$(run) cuantiza.bundle --recipes $(RECIPES) --names > /dev/null

# `generate` and `demo` build their artifact where it is missing.
built := $(shell [ -f $(artifact)/manifest.json ] && echo yes)
generate demo: override RECIPES = $(call quote,$(RECIPE))
# A prompt may have several lines, which a line of a recipe cannot hold, so it travels through the environment. make drops
# the spaces that begin a value on its command line; Linux has that line as it was typed.
export PROMPT
begin = $$(tr '\n\0' '\1\n' 2> /dev/null < /proc/$$PPID/cmdline | sed -n "s/^PROMPT=\([[:blank:]$$(printf '\1')]*\).*/\1./p" | tail -n 1 | tr '\1' '\n')
# `exec`: a signal that ends make is handed to its child, and a shell in between would keep it for itself.
generate: $(if $(built),$(ready),quantize) ## continue PROMPT= in the terminal; GENERATE="--top-k 50 --seed 1"
	@begin="$(begin)"; exec $(run) cuantiza.generate --artifact=$(artifact) --prompt="$${begin%.}$$PROMPT" $(GENERATE)

demo: js $(if $(built),$(ready),quantize) ## a page that continues text in the browser
	@exec $(run) cuantiza.demo --artifact=$(artifact) --port=$(call quote,$(PORT)) $(call option,--build,$(BUILD))

sweep: $(if $(RAY),ray,$(ready)) ## a grid of MODELS=, RECIPES= and CORPORA=, on a cluster with RAY=auto or host:port; SWEEP= for more options
	@$(if $(RAY),$(RAY_VENV),$(VENV))/bin/python -m cuantiza.sweep --models $(or $(MODELS),$(call quote,$(MODEL))) --recipes $(RECIPES) --corpora $(or $(CORPORA),$(call quote,$(CORPUS)))$(reading) \
	  $(call option,--ray,$(RAY)) --work=$(call quote,$(OUT)/sweep) --output=$(call quote,$(REPORTS)/sweep) $(SWEEP)

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

# A process for each processor. The tests of one file stay together, since they share what they build.
test: $(ready) ## the tests; TESTS=tests/quantize for some of them
	@$(run) pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TESTS)

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
