"""Regenerate tables, figures and page of a suite or an experiment from its records alone.

Usage: python -m twinbench.report suite=NAME|experiment=NAME [results_dir=results/local] [reference=twin_merging]

  suite        report all its runs on the test split (if there are none: on held-out rows); or
  experiment   report the runs of this experiment; where it has its suite's name, all runs of both
  results_dir  folder with records/, predictions/, experts/ and sweeps/; the report goes to its reports/NAME/
  reference    method or row that differences are taken to
"""

import sys
from pathlib import Path

from twinbench.report.make import REFERENCE, make
from twinbench.system.mistakes import Mistake, unknown

KEYS = ("suite", "experiment", "results_dir", "reference")


def main(arguments: list[str]) -> int:
    """Run the command line; 0, or 1 after one line of error."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0
    try:
        settings = parse(arguments)
        report = make(Path(settings.pop("results_dir")), **settings)
    except (Mistake, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report["summary"])
    print(report["folder"] / "index.html")
    return 0


def parse(arguments: list[str]) -> dict[str, str]:
    """The settings in ``key=value`` arguments over the defaults.

    Raises:
        ValueError: an argument is not ``key=value``, a key is unknown, or not one of suite and experiment is there.
    """
    settings = {"results_dir": "results/local", "reference": REFERENCE}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise Mistake(f"arguments are key=value with a key of {', '.join(KEYS)}; got {argument!r}")
        if key not in KEYS:
            raise Mistake(unknown("setting", key, KEYS))
        settings[key] = value
    if len({"suite", "experiment"} & settings.keys()) != 1:
        raise Mistake("give suite=NAME or experiment=NAME")
    return settings


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
