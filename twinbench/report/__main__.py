"""Regenerate a suite's tables, figures and page from its records alone.

Usage: python -m twinbench.report suite=NAME [results_dir=results/local] [reference=twin_merging]

  suite        whose records to report
  results_dir  folder with records/ and predictions/; the report goes to its reports/NAME/
  reference    method or row that differences are taken to
"""

import sys
from difflib import get_close_matches
from pathlib import Path

from twinbench.report import REFERENCE, make

KEYS = ("suite", "results_dir", "reference")


def main(arguments: list[str]) -> int:
    """Run the command line; 0, or 1 after one line of error."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0
    try:
        settings = parse(arguments)
        report = make(Path(settings["results_dir"]), settings["suite"], reference=settings["reference"])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report["summary"])
    print(report["folder"] / "index.html")
    return 0


def parse(arguments: list[str]) -> dict[str, str]:
    """The settings in ``key=value`` arguments over the defaults.

    Raises:
        ValueError: an argument is not ``key=value``, a key is unknown, or there is no suite.
    """
    settings = {"results_dir": "results/local", "reference": REFERENCE}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise ValueError(f"arguments are key=value with a key of {', '.join(KEYS)}; got {argument!r}")
        if key not in KEYS:
            near = get_close_matches(key, KEYS, 1, 0)[0]
            raise ValueError(f"unknown setting {key!r}; did you mean {near!r}?")
        settings[key] = value
    if "suite" not in settings:
        raise ValueError("suite=NAME is missing")
    return settings


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
