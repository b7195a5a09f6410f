# Every target sets up what it needs by itself: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Texts to train on, which are not part of the project: see docs/training.md.
DATA ?= ../shared/data
STORIES := $(DATA)/stories/decoding_gpt_tinystories_10k.txt $(DATA)/stories/jlens_tinystories_1000.txt
STORIES_HELD_OUT := $(DATA)/stories/moe_routing_bench_tinystories_val.txt
BOOKS_HELD_OUT := $(DATA)/books/heldout.jsonl.xz
RUNS ?= runs
# Processes that share the tests, each with one thread and up to 2 GiB.
WORKERS ?= 2
TESTS = $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile -m "not slow"
EMBEDDED := --size small --layers 7 --heads 2 --kv-heads 1 --vocabulary 8192 --batch-tokens 8192 --tokens 24000000 \
	--measures 12 --save-dtype bfloat16

.PHONY: demo test check coverage slow browser bench bench-peers docs page candidates embedded twins million evaluations results clean

demo: $(READY)  ## set up, and let the embedded model tell stories beyond its trained length
	$(BIN)/streamllm run --endless --max-tokens 1500 --seed 7 --stats "Once upon a time"

test: check browser  ## everything that CI runs
	$(TESTS)

coverage: $(READY) browser  ## the same tests, and how much of the code they reach; takes half as long again
	$(TESTS) --cov --cov-report=term

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow: $(READY) browser  ## the long tests that CI leaves out
	$(BIN)/python -m pytest -m slow

bench: $(READY)  ## speed and memory; writes docs/results/
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/endless.py --threads 1
	$(BIN)/python benchmarks/pipe.py --threads 1
	$(BIN)/python benchmarks/blocks.py
	$(BIN)/python benchmarks/chat.py --threads 1
	$(BIN)/python benchmarks/conversation.py
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/soak.py
	$(BIN)/streamllm bench --shape 135M --threads 2 --out docs/results
	$(BIN)/python benchmarks/training.py

bench-peers: $(READY)  ## install what streamllm bench compares with; llama.cpp is compiled, which takes minutes
	$(PIP) install --constraint constraints.txt --editable '.[peers]'

docs: $(READY)  ## tables that are made from the tests
	$(BIN)/python -m pytest -q tests/test_laws.py --families-table docs/families.md

page: $(READY) browser  ## take the README's picture of the page anew
	STREAMLLM_PICTURE=docs/page.png $(BIN)/python -m pytest -q tests/test_page.py -m slow -k picture

$(RUNS)/plain.jsonl.xz: $(READY)
	mkdir -p $(RUNS)
	$(BIN)/python recipes/plain_books.py --stories $(STORIES) --books $(wildcard $(DATA)/books/train-*.jsonl.xz) --chars 60e6 --out $@

candidates: $(RUNS)/plain.jsonl.xz  ## compare recipes for the embedded model; writes docs/results/
	$(BIN)/python recipes/candidates.py --stories $(STORIES) --books $< --heldout $(STORIES_HELD_OUT) $(BOOKS_HELD_OUT) --work $(RUNS)/candidates --minutes 2.5

embedded: $(RUNS)/plain.jsonl.xz  ## train the embedded model anew, or go on with it
	$(BIN)/streamllm train --out $(RUNS)/embedded $(EMBEDDED) --heldout $(STORIES_HELD_OUT) --heldout $(BOOKS_HELD_OUT) \
		$(if $(wildcard $(RUNS)/embedded/training/run.json),--resume) --data $(STORIES:%=%:5) $<

twins: $(READY)  ## the paper's table 3 at small scale, and when sinks appear; writes docs/results/
	mkdir -p $(RUNS)/twins
	$(BIN)/python recipes/twins.py --data $(wildcard $(DATA)/books/train-*.jsonl.xz) --heldout $(BOOKS_HELD_OUT) --work $(RUNS)/twins

$(RUNS)/unread.jsonl.xz: $(READY)
	mkdir -p $(RUNS)
	$(BIN)/python recipes/plain_books.py --stories $(STORIES) --books $(wildcard $(DATA)/books/train-*.jsonl.xz) --after 60e6 --chars 24e6 --out $@

EVAL = OMP_NUM_THREADS=1 $(BIN)/streamllm eval
EVAL_OUT := docs/results/eval
# The model knows four digits, and a context of 256 tokens.
STREAMEVAL := --digits 4 --window 188 --block 16 --sinks 1 --distances 5,10,15,20,25,30,40,60,80,100
EVAL_TEXT := --data $(STORIES_HELD_OUT) $(BOOKS_HELD_OUT)

evaluations: $(RUNS)/unread.jsonl.xz $(RUNS)/streameval/copier/config.json  ## all of docs/results/eval, in about three hours
	for model in "" "-m tests/models/stories260K"; do \
		$(EVAL) perplexity $$model --tokens 200001 $(EVAL_TEXT) --out $(EVAL_OUT) && \
		$(EVAL) perplexity $$model --methods window,streaming --tokens 20001 --block 1 --step 1 $(EVAL_TEXT) \
			--out $(EVAL_OUT)/token-by-token && \
		$(EVAL) sinks $$model $(EVAL_TEXT) --out $(EVAL_OUT) && \
		$(EVAL) cache-size $$model $(EVAL_TEXT) --out $(EVAL_OUT) && \
		$(EVAL) arc $$model --data $(DATA)/eval/arc_easy_test.json --out $(EVAL_OUT) && \
		$(EVAL) attention $$model $(EVAL_TEXT) --out $(EVAL_OUT) && \
		$(EVAL) drift $$model --tokens 1000000 $(EVAL_TEXT) --out $(EVAL_OUT) || exit 1; \
	done
	$(EVAL) streameval -m $(RUNS)/streameval/copier $(STREAMEVAL) --out $(EVAL_OUT)
	$(EVAL) perplexity --methods dense,streaming --tokens 4000001 $(EVAL_TEXT) $< --out $(EVAL_OUT)/4M
	$(EVAL) recall $(EVAL_TEXT) --out $(EVAL_OUT)
	$(BIN)/python recipes/results.py

$(RUNS)/streameval/copier/config.json: $(READY)
	$(BIN)/python recipes/streameval.py --work $(RUNS)/streameval

results: $(READY)  ## write the page of all results anew
	$(BIN)/python recipes/results.py --figures

million: $(READY)  ## a million tokens through the embedded model; writes docs/results/
	$(BIN)/python recipes/million.py --text $(STORIES_HELD_OUT) $(BOOKS_HELD_OUT)

# The page's tests drive Debian's Chromium: installed where that is possible, otherwise they say how.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium; \
		else echo "The page is tested in Chromium only, and none is here: install it, such as by apt-get install chromium."; fi

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("streamllm needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
