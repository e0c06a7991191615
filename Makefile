# Everything a newcomer needs: `make run` and `make test`. Both set up by themselves.
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
NODE_DIR := tests/e2e/node
BENCH_STAMP := .bench-venv/.ready
NODE_STAMP := $(NODE_DIR)/node_modules/.ready
export PYTHONDONTWRITEBYTECODE :=
ARGS ?=
NAME ?=

.PHONY: run test e2e check fix lock lock-clean bench sessions setup clean
.DEFAULT_GOAL := run

run: $(STAMP)   ## the embedded cloud and the app on http://127.0.0.1:7071
	@exec $(BIN)/troop up $(ARGS)

test: $(STAMP) $(NODE_STAMP)   ## every test; under three minutes
	@exec $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

e2e: $(STAMP) $(NODE_STAMP)   ## only the tests that start real processes
	@exec $(BIN)/python -m pytest -m e2e $(ARGS)

check: $(STAMP)   ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(STAMP)   ## what a machine can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

PEERS := fetcher signals backtest
bench: $(STAMP) $(NODE_STAMP) $(if $(filter $(PEERS),$(NAME)),$(BENCH_STAMP))   ## make bench NAME=pipeline
	@test -n "$(NAME)" || { echo "say which: make bench NAME=coldstart | pipeline | documents | fetcher | signals | backtest | delivery | fanout"; exit 2; }
	@exec $(if $(filter $(PEERS),$(NAME)),.bench-venv/bin,$(BIN))/python -m bench.$(NAME) $(ARGS)

setup: $(STAMP)

$(STAMP): requirements-dev.txt
	@PY=$$(sh infra/find_python.sh) || exit 1; \
	  echo "setting up $(VENV) (once; a minute or so)"; \
	  rm -rf $(VENV) && "$$PY" -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r requirements-dev.txt
	@printf '#!/bin/sh\n# Written by make: the command line of this checkout.\nroot=$$(CDPATH= cd -- "$$(dirname -- "$$0")/../.." && pwd)\nPYTHONPATH="$$root$${PYTHONPATH:+:$$PYTHONPATH}" exec "$$root/$(BIN)/python" -m infra.cli "$$@"\n' > $(BIN)/troop
	@chmod +x $(BIN)/troop
	@touch $@

$(BENCH_STAMP): requirements-bench.txt
	@PY=$$(sh infra/find_python.sh) || exit 1; \
	  echo "setting up .bench-venv with the peers that benchmarks compare with (once; a minute or two)" >&2; \
	  rm -rf .bench-venv && "$$PY" -m venv .bench-venv
	@.bench-venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r requirements-bench.txt
	@touch $@

$(NODE_STAMP): $(NODE_DIR)/package-lock.json
	@command -v npm >/dev/null || { echo "npm is missing: install Node.js 20 or newer, then run make test again"; exit 1; }
	@cd $(NODE_DIR) && npm ci --silent --no-fund --no-audit
	@touch $@

lock:   ## compile the locked requirements from pyproject.toml
	@PY=$$(sh infra/find_python.sh) || exit 1; \
	  test -x .lock-venv/bin/uv || { "$$PY" -m venv .lock-venv && .lock-venv/bin/pip install --quiet uv; }
	@.lock-venv/bin/uv pip compile --quiet --no-config --universal --python-version 3.13 --generate-hashes --no-emit-index-url --custom-compile-command "make lock" pyproject.toml -o requirements.txt
	@.lock-venv/bin/uv pip compile --quiet --universal --python-version 3.13 --generate-hashes --no-emit-index-url --custom-compile-command "make lock" --group dev -c requirements.txt pyproject.toml -o requirements-dev.txt
	@.lock-venv/bin/uv pip compile --quiet --universal --python-version 3.13 --generate-hashes --no-emit-index-url --custom-compile-command "make lock" --group dev --group bench pyproject.toml -o requirements-bench.txt
	@echo exchange_calendars | .lock-venv/bin/uv pip compile --quiet --universal --python-version 3.13 --generate-hashes --no-emit-index-url --custom-compile-command "make lock" - -o requirements-sessions.txt
	@$(MAKE) --no-print-directory lock-clean
lock-clean:
	@! grep -nE '^[^#]*(https?://|file:)|^--(extra-)?index|^--find-links' requirements.txt requirements-dev.txt requirements-bench.txt requirements-sessions.txt

sessions:   ## generate shared/market/sessions.json again from exchange_calendars (ARGS=--check compares)
	@PY=$$(sh infra/find_python.sh) || exit 1; test -e .sessions-venv/.ready || { "$$PY" -m venv .sessions-venv && .sessions-venv/bin/pip install -qq --no-deps --require-hashes -r requirements-sessions.txt && touch .sessions-venv/.ready; }
	@.sessions-venv/bin/python infra/make_sessions.py $(ARGS)

clean:
	rm -rf $(VENV) .bench-venv .lock-venv .sessions-venv $(NODE_DIR)/node_modules .troop
