# make demo: convert a real language model on this machine.   make smoke: the same with no download.
# make test: the test suite.   make test-slow: real processes, the demo's commands.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(shell date +%Y%m%d-%H%M%S)
MODEL := models/smollm2-135m/config.json

.PHONY: setup demo smoke test test-slow lint bench clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	@if command -v uv >/dev/null; then uv venv -q --seed --allow-existing $(VENV) && \
	  uv pip install -q -p $(PY) -c constraints.txt -e ".[dev]"; \
	else python3 -m venv $(VENV) && $(PY) -m pip install -q -c constraints.txt -e ".[dev]"; fi
	@touch $@

$(MODEL): | $(VENV)/.done
	$(PY) scripts/download_model.py

demo: setup $(MODEL)
	$(PY) train_kd.py --layers 10,14,20 --run demo-$(STAMP)

smoke: setup
	$(PY) train.py --config configs/smoke.yaml --torch_compile=False --run smoke-$(STAMP)
	$(PY) train_kd.py --config configs/smoke-kd.yaml --teacher runs/smoke-$(STAMP)/model \
	  --layers 3:1 --torch_compile=False --run smoke-kd-$(STAMP)

# As many workers as tests/conftest.py says.
PYTEST = $(PY) -m pytest -n auto --dist worksteal

test: setup
	$(PYTEST)

test-slow: setup $(MODEL)
	$(PYTEST) -m slow

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# With a GPU also the speed of everything, beside what peers are installed; NANOGPT and NANOCHAT
# name checkouts of those.
CUDA = $(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"
PEERS = $(if $(NANOGPT),--nanogpt $(NANOGPT)) $(if $(NANOCHAT),--nanochat $(NANOCHAT))

bench: setup
	$(PY) benchmarks/gated_delta_rule.py
	$(PY) benchmarks/muon_adamw.py
	@if $(CUDA); then set -ex; $(PY) benchmarks/pretrain.py $(PEERS); \
	  for b in kd_head kd_step align muon loader kernels mixers decode; do $(PY) benchmarks/$$b.py; done; fi

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
