# make quickstart install the requirements and run the three scripts on the embedded data
# make style      rewrite the code as ruff wants it
# make quality    the same as a check, nothing rewritten
# make test       the unit tests
# make smoke      the scripts as users run them
# make slow       kills, damage and signals at many places of a run: half an hour
# make lowest     test and smoke in a new environment with the lowest versions that requirements.txt allows
# All but the installing runs offline. style to slow need `pip install -r requirements-dev.txt`.

PYTHON ?= python
LAUNCH = accelerate launch --config_file accelerate_configs/cpu.yaml
LOWEST = $(CURDIR)/build/lowest
export HF_HUB_OFFLINE = 1

.PHONY: quickstart style quality test smoke slow lowest

quickstart:
	$(PYTHON) -m pip install -r requirements.txt
	$(LAUNCH) train_retrieve.py --group_by_document --num_hard_negatives 20 --negatives_pool 50 --draft_share 0.7 --found_weight 0.1
	$(LAUNCH) train_summarize.py --train_file outputs/retrieve/retrieved.train.jsonl --validation_file outputs/retrieve/retrieved.validation.jsonl --passage_order rank
	$(LAUNCH) retrieve_and_summarize.py

style:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

quality:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

test:
	$(PYTHON) -m pytest -q -n 2 --dist worksteal -m "not slow" tests --ignore=tests/test_smoke.py --ignore=tests/test_hops.py

smoke:
	$(PYTHON) -m pytest -q -n 2 --dist loadfile -m "not slow" tests/test_smoke.py tests/test_hops.py

slow:
	$(PYTHON) -m pytest -q -n 2 --dist worksteal -m slow tests

# requirements.txt with == in place of each >= is what pip must keep to
lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	sed 's/>=\([^,]*\).*/==\1/' requirements.txt > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install -q -r requirements-dev.txt -c $(LOWEST)/lowest.txt
	$(MAKE) test smoke PYTHON=$(LOWEST)/bin/python
