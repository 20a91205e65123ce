"""A section of a report: the tables and figures under one heading."""

from dataclasses import dataclass

import pandas as pd

from twinbench.protocol import NORMALIZER


@dataclass(frozen=True)
class Section:
    """Tables and figures under one heading; ``figures`` holds the ``svg`` and ``png`` bytes of each."""

    heading: str
    sentence: str  # under the heading
    slug: str  # begins the names of its files
    older: bool  # of a suite_id that is not the newest of its suite
    tables: dict[str, pd.DataFrame]
    notes: list[str]
    figures: dict[str, dict[str, bytes]]

    def file(self, name: str) -> str:
        """The stem of a table's or figure's files; the expert matrix is plainly ``experts`` where it is strict."""
        return name if (name, self.slug) == ("experts", NORMALIZER) else f"{self.slug}_{name}"
