"""One table: the wrappers, evaluating, logging and starting, each as a ratio with its goal.

    pip install -r benchmarks/requirements.txt -c constraints.txt
    python -m benchmarks [generation] [pipeline] [evaluation] [logging] [start] [structured] [--full-size]
    benchmarks/gpu.sh [the same]       on a machine with an NVIDIA GPU: installs the CUDA builds, and runs all on it

Without names all groups run, each in a process of its own so that none finds another's threads and memory: a quarter
of an hour on two cores, compiling llama-cpp-python not counted. `--full-size` adds a model of Phi-3-mini's shape, which
takes ten minutes more, 20 GB of memory and 40 GB of disk. What was found, and why a row falls short, is in
benchmarks/README.md.
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
    parser.add_argument("--execution_provider", choices=("cpu", "cuda"), default="cpu", help="cuda: all on a GPU")
    args = parser.parse_args()
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no group of {', '.join(GROUPS)}")
    if args.execution_provider == "cuda":
        check_gpu()
    rows: list[ratios.Row] = []
    for group in [*(args.groups or GROUPS), *(["full size"] if args.full_size else [])]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows += process.submit(rows_of, group, args.execution_provider).result()
    ratios.show(rows)


def check_gpu() -> None:
    """Every side must be able to use the GPU: the wrappers, and llama.cpp."""
    from slm.base import parameters
    from slm.base.errors import BadInput
    from slm.engines import local

    try:
        local.check_devices(parameters.Parameters(device="cuda", execution_provider="cuda"))
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
    import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        raise SystemExit("error: llama-cpp-python was compiled without CUDA; benchmarks/gpu.sh compiles it with it")


if __name__ == "__main__":
    main()
