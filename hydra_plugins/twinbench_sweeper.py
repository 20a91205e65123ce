"""A Hydra sweeper for sweeps that are no single grid. Hydra takes plugins from a namespace package of this name only.

``hydra.sweeper.blocks`` is a list of grids; the sweep is their union, each combined with what the command line gives.
``-m key=a,b`` alone is one grid, as with Hydra's basic sweeper.
"""

import itertools
import sys
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from twinbench.plan.preflight import whole
from twinbench.sweep import counted, make_folder, outcome, tally


class BlockSweeper(BasicSweeper):
    """Args:
    max_batch_size: as many jobs are handed to the launcher at once; null: all.
    blocks: mappings of override keys to comma-separated values, one grid each; a key that the command line sets is
        the command line's.
    """

    def __init__(self, max_batch_size: int | None, blocks: list[dict[str, str]]):
        super().__init__(max_batch_size=max_batch_size)
        self.blocks = blocks

    def sweep(self, arguments: list[str]) -> Any:
        if self.max_batch_size is not None:
            whole("hydra.sweeper.max_batch_size", self.max_batch_size, " or null")
        jobs = self.jobs(arguments)
        if not self.config.plan:
            self.validate_batch_is_legal(jobs)  # composes every job; planning does so only to print
            make_folder(self.config)
        returns = []
        with counted(self.config):
            for batch in self.split_overrides_to_chunks(jobs, self.max_batch_size):
                returns += self.launcher.launch(batch, initial_job_idx=len(returns))
        if self.config.plan and tally([outcome(job) for job in returns]):
            sys.exit(1)
        return returns

    def jobs(self, arguments: list[str]) -> list[list[str]]:
        """The overrides of each job of the union, none of them twice."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = parser.parse_overrides(arguments)
        fixed = {override.get_key_element() for override in given}
        jobs = []
        for block in self.blocks or [{}]:
            own = parser.parse_overrides([f"{key}={values}" for key, values in block.items() if key not in fixed])
            jobs += itertools.chain.from_iterable(self.split_arguments([*own, *given], None))
        return [list(job) for job in dict.fromkeys(map(tuple, jobs))]
