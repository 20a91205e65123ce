"""A Hydra sweeper for sweeps that are no single grid. Hydra takes plugins from a namespace package of this name only.

``hydra.sweeper.blocks`` is a list of grids; the sweep is their union, each combined with what the command line gives.
``-m key=a,b`` alone is one grid, as with Hydra's basic sweeper. The report follows when the jobs have ended.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from twinbench.sweep import finish


class BlockSweeper(BasicSweeper):
    """Args:
    blocks: mappings of override keys to comma-separated values, one grid each; a key that the command line sets is
        the command line's.
    """

    def __init__(self, max_batch_size: int | None, blocks: list[dict[str, str]]):
        super().__init__(max_batch_size=max_batch_size)
        self.blocks = blocks

    def sweep(self, arguments: list[str]) -> Any:
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = parser.parse_overrides(arguments)
        fixed = {override.get_key_element() for override in given}
        jobs = []
        for block in self.blocks or [{}]:
            own = parser.parse_overrides([f"{key}={values}" for key, values in block.items() if key not in fixed])
            jobs += itertools.chain.from_iterable(self.split_arguments([*own, *given], None))
        jobs = [list(job) for job in dict.fromkeys(map(tuple, jobs))]
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        if not self.config.plan:  # compose every job before the first one runs; planning composes them only to print
            self.validate_batch_is_legal(jobs)
        returns = self.launcher.launch(jobs, initial_job_idx=0)
        code = finish(self.config, [job.return_value for job in returns])
        if code:
            sys.exit(code)
        return returns
