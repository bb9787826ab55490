# The project's commands. Run them in the environment of CONTRIBUTING.md.

# The main job on the embedded model
run:
    mlflow run . --env-manager local

# Every test
test:
    python -m pytest -n 3

# The tests that start no server, export no model and build no environment
test-fast:
    python -m pytest -n 3 -m "not slow"

lint:
    ruff check . && ruff format --check . && mypy

format:
    ruff check --fix . && ruff format .

# Small faults put into the code that gives figures and words; about an hour. `mutmut results` lists what survived
mutants *names:
    mutmut run {{names}}

# The table of benchmarks/README.md; needs benchmarks/requirements.txt
bench *groups:
    python -m benchmarks {{groups}}

# The documentation as a site, in site/
docs:
    mkdocs build --strict
