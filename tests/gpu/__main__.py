"""Run the checks that need a GPU; on a machine without one, those that a CPU can stand in for.

    python -m tests.gpu                        all, in 450 seconds; writes gpu-checks.json
    python -m tests.gpu -o FILE                writes FILE instead
    python -m tests.gpu --only NAME            one; may be given again; writes only what -o names
    python -m tests.gpu --list                 their names, and what each shows

Exits with 1 if one fails, or if the time did not suffice for all. `make test-gpu` runs it in .venv. On a machine with a torch of its own and without a network
it needs only the wheels of `make gpu-wheels`, which are unpacked into the Python that has torch:

    python3 -m tests.gpu.wheels --install .wheels && python3 -m tests.gpu -o gpu.json
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.harness import FAILED, NO_TIME, Check, Place, Session, as_json, find_facts, run_here, table

RESULTS = Path("gpu-checks.json")
CHECKS = "tests.gpu.checks"
BUDGET_S = 450.0
CORES_PER_JOB = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the checks")
    parser.add_argument("--only", action="append", metavar="NAME", default=[], help="run only this check")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="for all checks")
    parser.add_argument("--jobs", type=int, metavar="N", help="checks at once; by default one for each four cores")
    parser.add_argument("--checks", default=CHECKS, metavar="MODULE", help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known: dict[str, Check] = {check.name: check for check in importlib.import_module(options.checks).CHECKS}
    if options.run:
        name, folder = options.run
        place = Place(device=os.environ["LABTRAIN_GPU_CHECKS_ON"], folder=Path(folder, "work"))
        place.folder.mkdir()
        run_here(known[name], place, Path(folder, "answer.json"))
        return 0
    if options.list:
        sys.stdout.writelines(f"{check.name:<28}{check.shows}\n" for check in known.values())
        return 0
    if unknown := set(options.only) - known.keys():
        parser.error(f"unknown check {min(unknown)}; --list names them")
    chosen = [check for check in known.values() if not options.only or check.name in options.only]
    began = time.monotonic()
    jobs = options.jobs or max(1, len(os.sched_getaffinity(0)) // CORES_PER_JOB)
    facts = find_facts()
    outcomes = Session(chosen, facts, source=options.checks, budget_s=options.budget, jobs=jobs).run()
    seconds = time.monotonic() - began
    sys.stdout.write(table(outcomes, facts, seconds))
    output = options.output or (None if options.only else RESULTS)
    if output is not None:
        output.write_text(as_json(outcomes, facts, seconds))
    return int(any(each.result == FAILED or each.figure.startswith(NO_TIME) for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
