# `just` alone lists the recipes; install it with `pip install rust-just`.

_default:
    @just --list

# Install for development
install:
    pip install -c constraints.txt -e ".[dev]"

# Format what can be formatted
format:
    ruff format .
    ruff check --fix .

# Everything that reads the code without running it
lint:
    bash .ci/lint

# The tests, a few minutes
test *arguments:
    pytest -n auto {{arguments}}

# The tests on the lowest versions that pyproject.toml promises
lowest *arguments:
    bash .ci/lowest {{arguments}}

# The tests that take minutes each
slow:
    pytest -n 0 -m slow

# Whole jobs killed at every file operation, every call failing once, full disks: hours
chaos *arguments:
    python -m tests.chaos {{arguments}}

# Damaged files and lies, for every reader: an hour
fuzz *arguments="--cases 10000":
    python -m tests.fuzz {{arguments}}

# The documentation, executed, into docs/_build/html
docs:
    pip install -q -c constraints.txt -e ".[docs]"
    sphinx-build -W --keep-going -j 2 -b html docs docs/_build/html

# What CI runs
check: lint test docs

# The benchmarks whose JSON lies in results/
bench data_dir:
    python benchmarks/mixture_em.py
    python benchmarks/iwae_cost.py
    python benchmarks/footprint.py --data-dir {{data_dir}}
    python benchmarks/training_loop.py --data-dir {{data_dir}}
    python benchmarks/stage_two.py mnist --data-dir {{data_dir}}
    python benchmarks/stage_two.py fashion-mnist --data-dir {{data_dir}}
    python benchmarks/one_class_tables.py
    python benchmarks/noise_updates.py --data-dir {{data_dir}}
    python benchmarks/codes.py --data-dir {{data_dir}}
    python benchmarks/held_out_variance.py --data-dir {{data_dir}}
    python benchmarks/correlated_noise.py --data-dir {{data_dir}}

# The benchmarks against pythae, which need the extra benchmarks
bench-peers data_dir:
    python benchmarks/throughput.py --data-dir {{data_dir}}
    python benchmarks/time_to_quality.py --data-dir {{data_dir}} --epochs 4 8 12 --precision bf16
    python benchmarks/peers.py --data-dir {{data_dir}} --threads 1
