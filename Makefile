# Two commands: `make run` and `make test`. Each first makes .venv and fetches the default assets, once.
#
#   make run                 execute notebooks/00_start_here.ipynb, print its table, write HTML
#   make run NOTEBOOK=22     another one by number or name, or NOTEBOOK=all
#   make run NOTEBOOK=41 PARAMETERS="epsilon=3 num_seeds=5"   with other values in its parameters cell
#   make test                every test and every notebook (small parameters)
#   make lab                 JupyterLab in the same environment
#   make experiments         the recorded grids (GRID=film_reviews for one; SHARD=1/4 for a part): hours, and goes on where it stopped
#   make refresh NOTEBOOK=22 execute with default parameters and write the outputs back into the notebook

NOTEBOOK ?= 00
PARAMETERS ?=
GRID ?=
PYTHON ?=
PYTEST_ARGUMENTS ?=

# The newest Python comes second: the versions in requirements.txt were tested together on 3.11.
find_python = for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do \
	if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$candidate; break; fi; \
	done

in_environment = PYTHONUNBUFFERED=1 .venv/bin/python

.PHONY: run test lab refresh experiments setup

run: setup
	@$(in_environment) -m memarc_utils.notebooks run "$(NOTEBOOK)" $(if $(PARAMETERS),--parameters $(PARAMETERS))

test: setup
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(in_environment) -m pytest -n 2 --maxschedchunk 1 --durations 15 $(PYTEST_ARGUMENTS)

lab: setup
	@$(in_environment) -m jupyterlab --notebook-dir notebooks notebooks/00_start_here.ipynb

refresh: setup
	@$(in_environment) -m memarc_utils.notebooks refresh "$(NOTEBOOK)"

experiments: setup
	@$(in_environment) -m memarc_utils.grids $(GRID)

setup:
	@python=$$($(find_python)); \
	if [ -z "$$python" ]; then \
		echo "Python 3.11 or newer is needed and none was found: install one, or name it with make PYTHON=/path/to/python." >&2; \
		exit 1; \
	fi; \
	exec $$python memarc_utils/environment.py
