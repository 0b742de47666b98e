"""Writes report.html of a run, finished or not: python scripts/report.py RUN."""

import argparse
import pathlib
import sys

from experiments import command_line
from sparse_lm.evaluate.report import write_report


def main() -> int:
    """Writes the report, prints its path and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=pathlib.Path, help="directory of the run")
    run_dir = parser.parse_args().run
    print(command_line.or_exit(lambda: write_report(run_dir), FileNotFoundError))
    return 0


if __name__ == "__main__":
    sys.exit(main())
