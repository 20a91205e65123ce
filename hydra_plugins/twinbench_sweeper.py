"""A Hydra sweeper for sweeps that are no single grid. Hydra takes plugins from a namespace package of this name only.

``hydra.sweeper.blocks`` is a list of grids; the sweep is their union, each combined with what the command line gives.
``-m key=a,b`` alone is one grid, as with Hydra's basic sweeper. The report follows when the jobs have ended.
"""

import itertools
import sys
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from twinbench.sweep import check, counted, finish, make_folder

NO_FILES = ("hydra.output_subdir=null", "hydra.job_logging.root=null", "hydra.sweep.dir=.", "hydra.sweep.subdir=.")


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
        check(self.config, [override.key_or_group for override in given if override.is_sweep_override()])
        fixed = {override.get_key_element() for override in given}
        jobs = []
        for block in self.blocks or [{}]:
            own = parser.parse_overrides([f"{key}={values}" for key, values in block.items() if key not in fixed])
            jobs += itertools.chain.from_iterable(self.split_arguments([*own, *given], None))
        jobs = [list(job) for job in dict.fromkeys(map(tuple, jobs))]
        if self.config.plan:
            self.config.hydra.sweep.dir = "."
            jobs = [[*job, *NO_FILES] for job in jobs]
        else:
            self.validate_batch_is_legal(jobs)  # composes every job; planning does so only to print
            make_folder(self.config)
        with counted(self.config):
            returns = self.launcher.launch(jobs, initial_job_idx=0)
        code = finish(self.config, [job.return_value for job in returns])
        if code:
            sys.exit(code)
        return returns
