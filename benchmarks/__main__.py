"""One table: the wrappers, evaluating, logging and starting, each as a ratio with its goal.

    pip install -r benchmarks/requirements.txt -c constraints.txt
    python -m benchmarks [generation] [pipeline] [evaluation] [logging] [start] [--full-size]

Without names all groups run, each in a process of its own so that none finds another's threads and memory: about half
an hour on two cores, compiling llama-cpp-python not counted. `--full-size` adds a model of Phi-3-mini's shape, which
takes 20 GB of memory and 40 GB of disk. What was found, and why a row falls short, is in benchmarks/README.md.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from benchmarks import ratios
from benchmarks.groups import GROUPS, rows_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of {', '.join(GROUPS)}; all of them by default")
    parser.add_argument("--full-size", action="store_true", help="a model of Phi-3-mini's shape as well")
    args = parser.parse_args()
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no group of {', '.join(GROUPS)}")
    rows: list[ratios.Row] = []
    for group in [*(args.groups or GROUPS), *(["full size"] if args.full_size else [])]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows += process.submit(rows_of, group).result()
    ratios.show(rows)


if __name__ == "__main__":
    main()
