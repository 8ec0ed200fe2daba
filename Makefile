.PHONY: check lint types test notebooks
check: lint types test
lint:
	ruff check .
	ruff format --check .
types:
	pyright
test:
	pytest
notebooks:
	python notebooks/execute.py
