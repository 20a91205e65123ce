"""Run one configuration of the benchmark and write down its records; `-m` or an experiment sweeps many."""

from twinbench.system.ending import ended_well, importing

if __name__ == "__main__":
    importing()

import os
from pathlib import Path

import hydra

from twinbench import command
from twinbench.system import processes

CONF = Path(__file__).resolve().parent / "conf"

if __name__ == "__main__":
    if processes.rank():  # the first process speaks for all; errors are everybody's
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.environ["TQDM_DISABLE"] = "1"
    # Launchers pickle the function that they call, so it is an importable one.
    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(command.main)
    ended_well(main, kept="what was finished is kept, experts and downloads too, and the same command goes on")
