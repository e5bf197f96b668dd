# Two commands for a newcomer: `make demo` and `make test`. Each installs what it needs into .venv first. `make test-long`
# adds what takes many minutes, such as sixty kills.
# For a release: `make constraints`, `make audit`, `make release`.
PYTHON ?= python3
VENV ?= .venv
TOOLS ?= .venv-tools
CLEAN ?= .venv-release

.PHONY: demo web test test-long constraints audit release clean

demo: $(VENV)/.installed
	$(VENV)/bin/clipress run configs/demo.yaml --out runs/demo

test: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -q

test-long: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -q -m "slow or not slow"

# What the page of `clipress demo` and `--layout web` runs models with, from npm: into export/layouts/web/vendor, and the wheel.
WEB := export/layouts/web/vendor
web: $(WEB)/.fetched
$(WEB)/.fetched:
	@command -v npm >/dev/null || { echo "make web: needs npm, to fetch onnxruntime-web; found none. Install Node.js."; exit 1; }
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix build/web \
	  onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0
	mkdir -p $(WEB)
	cd build/web/node_modules/onnxruntime-web/dist && cp ort.wasm.min.mjs ort.webgpu.min.mjs ort-wasm-simd-threaded.mjs \
	  ort-wasm-simd-threaded.wasm ort-wasm-simd-threaded.asyncify.mjs ort-wasm-simd-threaded.asyncify.wasm \
	  $(CURDIR)/$(WEB)
	cp build/web/node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs $(WEB)
	cp build/web/node_modules/@huggingface/tokenizers/LICENSE $(WEB)/LICENSE.tokenizers
	gzip --best --force --no-name $(WEB)/*.wasm
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else \
	  "clipress needs Python 3.10 to 3.13, found %d.%d. Choose one: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): PyTorch and what comes with it is about 6 GB, some minutes."
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[compress]'
	touch $@

# clip-benchmark is the independent evaluator that metrics are tested against, transformers, peft and sentence-transformers the
# libraries whose checkpoints are imported (peft imports accelerate, and that psutil). Their own dependencies are many, and what is
# compared needs none of them. open_clip would import transformers in every process, so they stay in a folder of their own.
$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps clip-benchmark==1.6.2
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade \
	  --target $(VENV)/oracles 'transformers==5.24.0; python_version >= "3.11"' 'peft==0.21.2; python_version >= "3.11"' \
	  'accelerate==1.15.0; python_version >= "3.11"' 'psutil==7.2.2; python_version >= "3.11"' \
	  'sentence-transformers==6.2.0; python_version >= "3.11"'
	@# optimum reads ONNX with an older transformers than the others, and what that needs.
	$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade --requirement tests/optimum.txt \
	  --target $(VENV)/oracles-optimum
	@# Exports in its layout are read by transformers.js itself, where there is Node.
	command -v npm >/dev/null && npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(VENV)/js \
	  @huggingface/transformers@4.3.1 || echo "without Node: the tests of --layout transformers.js are skipped"
	@# The page of `clipress demo` is tested in Chromium, where both are there.
	$(MAKE) --silent web || echo "without Node: the tests of the demo page are skipped"
	touch $@

# Newest versions that fit pyproject.toml, for every supported Python. Run the tests before you commit what comes out.
constraints: $(TOOLS)/.installed
	$(TOOLS)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 --no-header --no-annotate \
	  --extra test pyproject.toml --output-file constraints.txt
	sed -i '1i # Made by `make constraints`, used by `make demo` and `make test`, and for the tested versions elsewhere:\n# pip install --constraint constraints.txt "clipress[serve]"' constraints.txt

audit: $(TOOLS)/.installed
	$(TOOLS)/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

# Into dist/: sdist, the wheel built from it, and CycloneDX lists of what it brings into an empty environment: alone, and with
# the extras serve, index and compress, each of which holds the one before.
release: $(TOOLS)/.installed $(WEB)/.fetched
	rm -rf dist build $(CLEAN)
	$(TOOLS)/bin/python -m build
	$(TOOLS)/bin/twine check --strict dist/*
	$(PYTHON) -m venv --without-pip $(CLEAN)
	set -e; wheel=$$(ls dist/*.whl); for extra in '' serve index compress; do \
	  $(TOOLS)/bin/python -m pip --python $(CLEAN)/bin/python install --quiet --constraint constraints.txt \
	    "$$wheel$${extra:+[$$extra]}"; \
	  (cd $(CLEAN) && bin/clipress --version); \
	  $(TOOLS)/bin/cyclonedx-py environment --output-reproducible $(CLEAN)/bin/python \
	    | $(TOOLS)/bin/python .ci/sbom.py > "dist/clipress$${extra:+-$$extra}.cdx.json"; \
	done

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --upgrade pip 'build>=1.2' 'cyclonedx-bom>=7' 'pip-audit>=2.9' 'twine>=6.1' 'uv>=0.8'
	touch $@

clean:
	rm -rf $(VENV) $(TOOLS) $(CLEAN) build dist runs
