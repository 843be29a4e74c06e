# Every target does its own set-up. KUBE_CONTEXT=NAME uses an existing cluster, REGISTRY=HOST/PATH pushes images there.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

export KUBE_CONTEXT REGISTRY

CLUSTER := python3 tests/cluster/cluster.py
PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
# Puts kubectl, helm and the kubeconfig of the cluster in place for one recipe line.
WITH_CLUSTER := eval "$$($(CLUSTER) env)" &&
UNIT_TESTS := tests/contract tests/kubectl tests/operator tests/trainer tests/examples tests/chaos tests/cluster tests/drills tests/benchmarks

.PHONY: help
help: ## Show this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install system packages and make the virtual environment
	@$(CLUSTER) setup

.venv/kubetune.stamp: pyproject.toml
	@$(CLUSTER) venv

.PHONY: demo
demo: ## Fine-tune a real model on a real cluster, from nothing to an answer
	@$(CLUSTER) up --venv --images
	@$(WITH_CLUSTER) $(PYTHON) examples/demo/run.py

.PHONY: demo-clean
demo-clean: .venv/kubetune.stamp ## Remove what the demo made from the cluster; the cluster stays
	@$(WITH_CLUSTER) $(PYTHON) examples/demo/run.py --clean

.PHONY: lint
lint: .venv/kubetune.stamp ## Check format, length, types, who imports whom, and that generated files are up to date
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	@find benchmarks examples operator tests trainer -name '*.py' -exec wc -l {} + | awk '$$2 != "total" && $$1 > 400 \
		{ print $$2 ": " $$1 " lines, but 400 are the most: split it by subject"; long = 1 } END { exit long }'
	.venv/bin/mypy
	MYPYPATH=tests/cluster .venv/bin/mypy $(filter-out tests/cluster/test_%,$(wildcard tests/cluster/*.py))
	.venv/bin/lint-imports
	$(PYTHON) -m kubetune_operator.crd --check
	$(PYTHON) -m kubetune_trainer.reference --check

.PHONY: test
test: ## Run everything: lint, then unit, integration and end-to-end tests
	@$(CLUSTER) up --venv --images
	@$(MAKE) lint
	@$(WITH_CLUSTER) $(PYTEST) $(UNIT_TESTS) tests/integration tests/e2e $(ARGS)

.PHONY: test-unit
test-unit: .venv/kubetune.stamp ## Run the tests that need nothing (the inner loop); ARGS='-k word' selects
	@$(PYTEST) $(UNIT_TESTS) -m "not integration and not e2e" $(ARGS)

.PHONY: test-integration
test-integration: ## Run the tests that need an API server
	@$(CLUSTER) up --venv
	@$(WITH_CLUSTER) $(PYTEST) tests/cluster tests/integration $(ARGS)

.PHONY: test-e2e
test-e2e: ## Run the tests that need a node and the images
	@$(CLUSTER) up --venv --images
	@$(WITH_CLUSTER) $(PYTEST) tests/e2e $(ARGS)

.PHONY: drills
drills: ## Let everything go wrong on the cluster, one thing at a time, and write docs/drills.md; ARGS='name name' selects
	@$(CLUSTER) up --venv --images
	@$(WITH_CLUSTER) PYTHONPATH=examples/demo:tests/cluster $(PYTHON) -m tests.drills.run $(ARGS)

.PHONY: chaos
chaos: ## 200 faults drawn from a seed hit short jobs on the node, written into docs/chaos.md; FAULTS=20, SEED=7 choose others
	@$(CLUSTER) up --venv --images
	@$(WITH_CLUSTER) PYTHONPATH=examples/demo:tests/cluster $(PYTHON) -m tests.chaos.run \
		--faults $(or $(FAULTS),200) --seed $(or $(SEED),0) $(ARGS)

.PHONY: fuzz
fuzz: .venv/kubetune.stamp ## Spoil what others write, many times over (minutes for each target); EXAMPLES=1000 and ARGS='-k word' choose
	@HYPOTHESIS_PROFILE=long KUBETUNE_FUZZ_EXAMPLES=$(or $(EXAMPLES),20000) $(PYTEST) --timeout=0 --hypothesis-show-statistics \
		$(wildcard tests/*/fuzz) $(ARGS)

.PHONY: drill-kill
drill-kill: ## 200 jobs while the operator is killed at random; JOBS=50, SEED=7 and REPLICAS=2 choose others
	@$(CLUSTER) up --venv
	@$(WITH_CLUSTER) KUBETUNE_DRILL_JOBS=$(or $(JOBS),200) KUBETUNE_DRILL_SEED=$(or $(SEED),0) \
		KUBETUNE_DRILL_REPLICAS=$(or $(REPLICAS),1) $(PYTEST) -s tests/integration/operator/test_kills.py

.PHONY: generate
generate: .venv/kubetune.stamp ## Write the generated files (crds/, docs/)
	$(PYTHON) -m kubetune_operator.crd
	$(PYTHON) -m kubetune_trainer.reference

.PHONY: cluster-up
cluster-up: ## Start the embedded cluster, or repair it
	@$(CLUSTER) up

.PHONY: cluster-down
cluster-down: ## Stop the embedded cluster and remove what it left, volumes included; caches stay
	@$(CLUSTER) down

.PHONY: cluster-status
cluster-status: ## Show every component of the embedded cluster
	@$(CLUSTER) status

.PHONY: images
images: ## Build both images, push them, print their references
	@$(CLUSTER) build-images

.PHONY: kubeconfig
kubeconfig: ## Print the path of the cluster's kubeconfig
	@$(CLUSTER) kubeconfig

.PHONY: clean
clean: ## Remove the virtual environment and the tools' caches from this clone
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
