# make export quantize eval      the whole pipeline on the embedded model; sets itself up
# make test                      the tests
#
# make optimum                   the second environment, for EXPORTER=optimum
# make accuracy                  docs/accuracy.md anew; MODELS="FOLDER ..." and TEXT=file add to it
# make lint | clean              the linter | remove artifacts and reports
#
# MODEL=folder | owner/name[@revision]   CORPUS=file | folder | owner/name   RECIPES="int8-dynamic ort-static ..."

PYTHON  ?= python3
VENV    ?= .venv
OPTIMUM_VENV ?= .venv-optimum

MODEL   ?= models/es-mini
CORPUS  ?= corpus/es
RECIPES ?= int8-dynamic int8-static
OUT     ?= artifacts
REPORTS ?= reports
OPSET   ?= 21
EXPORTER ?= graph
QUANTIZE ?=
EVAL    ?=

run      = $(VENV)/bin/python -m
ready    = $(VENV)/.stamp
corpus   = --corpus "$(CORPUS)" $(if $(CORPUS_CONFIG),--corpus-config "$(CORPUS_CONFIG)") \
           $(if $(CORPUS_SPLIT),--corpus-split "$(CORPUS_SPLIT)") $(if $(CORPUS_COLUMN),--corpus-column "$(CORPUS_COLUMN)")

.PHONY: export quantize eval accuracy optimum test lint clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

$(VENV)/.stamp: pyproject.toml pins/default.txt tools/setup_env.py
	@$(PYTHON) tools/setup_env.py "$(VENV)" pins/default.txt

$(OPTIMUM_VENV)/.stamp: pyproject.toml pins/optimum.txt tools/setup_env.py
	@$(PYTHON) tools/setup_env.py "$(OPTIMUM_VENV)" pins/optimum.txt

optimum: $(OPTIMUM_VENV)/.stamp

export: $(ready) $(if $(filter optimum,$(EXPORTER)),optimum)
	@OPTIMUM_PYTHON="$(OPTIMUM_VENV)/bin/python" $(run) export --model "$(MODEL)" --exporter "$(EXPORTER)" --opset "$(OPSET)" --output "$(OUT)"

quantize: export
	@$(run) quantize --model "$(MODEL)" --recipes $(RECIPES) --output "$(OUT)" $(corpus) $(QUANTIZE)

eval: quantize
	@$(run) eval --model "$(MODEL)" --recipes fp32 $(RECIPES) --artifacts "$(OUT)" --output "$(REPORTS)" $(corpus) $(EVAL)

accuracy: $(ready)
	@OPTIMUM_PYTHON="$(OPTIMUM_VENV)/bin/python" $(VENV)/bin/python tools/accuracy.py $(if $(MODELS),--models $(MODELS)) $(if $(TEXT),--text "$(TEXT)")

test: $(ready)
	@$(run) pytest $(TESTS)

lint: $(ready)
	@$(run) ruff check .
	@$(run) ruff format --check .

clean:
	rm -rf artifacts reports .pytest_cache .ruff_cache
