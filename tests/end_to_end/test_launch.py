"""Sweeps as they are launched: two at once, other launchers, batches, jobs that die, and what an optimizer gets."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from omegaconf import OmegaConf

from support.commands import OS_ENVIRON, ROOT, command, composed, rows_of
from support.family import CLASSES, write_suite
from twinbench import command as commands
from twinbench import prepare
from twinbench.records import store
from twinbench.sweep import Outcome
from twinbench.system.mistakes import Mistake

LAUNCHER = '''
"""A launcher of two processes, to which everything goes as a pickle, as joblib's, submitit's and Ray's do it."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import cloudpickle
from hydra.core.singleton import Singleton
from hydra.core.utils import run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import open_dict


class TwoProcesses(Launcher):
    def setup(self, *, hydra_context, task_function, config):
        self.given = hydra_context, task_function, config

    def launch(self, job_overrides, initial_job_idx):
        print("batch of", len(job_overrides), flush=True)
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            given = cloudpickle.dumps((*self.given, Singleton.get_state()))
            numbered = enumerate(job_overrides, initial_job_idx)
            jobs = [pool.submit(run, given, list(overrides), number) for number, overrides in numbered]
            return [cloudpickle.loads(job.result()) for job in jobs]


def run(given, overrides, number):
    setup_globals()
    context, task, config, state = cloudpickle.loads(given)
    Singleton.set_state(state)
    config = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    places = {"job_dir_key": "hydra.sweep.dir", "job_subdir_key": "hydra.sweep.subdir"}
    return cloudpickle.dumps(run_job(hydra_context=context, task_function=task, config=config, **places))
'''
DYING = """
import sys
sys.argv[0] = "run.py"
from twinbench import command
measure = command.run

def run(cfg):
    if cfg.method._target_.endswith("ties.merge"):
        raise RuntimeError("the job is dead")
    return measure(cfg)

command.run = run
import runpy
runpy.run_path("run.py", run_name="__main__")
"""


def numbers(results) -> dict:
    return {(row["run_id"], row["task"], row["metric"]): row["value"] for row in store.read(results)}


def test_two_identical_sweeps_at_once_share_the_work(family, tmp_path):
    recipe = {"epochs": 2, "batch_size": 8, "lr": 5e-3, "weight_decay": 0.0, "warmup": 0.1, "freeze": [], "seed": 0}
    write_suite(family, tmp_path / "conf", checkpoints=None, finetune=recipe)
    arguments = ["--config-dir", str(tmp_path / "conf"), "-m", "suite=tiny", "method=average,individual,ties,dare"]
    arguments += ["wandb.mode=disabled", f"results_dir={tmp_path / 'results'}"]
    environment = OS_ENVIRON | {"TWINBENCH_CACHE": str(tmp_path / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    start = [sys.executable, "run.py", *arguments]
    sweeps = [subprocess.Popen(start, cwd=ROOT, env=environment, **pipes) for _ in range(2)]
    said = [sweep.communicate(timeout=300) for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], said
    files = [path.stem.partition("-")[2] for path in (tmp_path / "results" / "records").iterdir()]
    assert len(files) == 4 and set(Counter(files).values()) == {1}, "each run is measured once, and no claim is left"
    lines = [line for out, _ in said for line in out.splitlines()]
    trained = [line.split(":")[0] for line in lines if line.startswith("fine-tuning expert")]
    assert sorted(trained) == sorted(f"fine-tuning expert {task}" for task in CLASSES)
    ends = Counter(line.split()[0] for line in lines if line.startswith(("running ", "skipped ")))
    assert ends == {"running": 4, "skipped": 4}
    page = (tmp_path / "results" / "reports" / "tiny" / "leaderboard.md").read_text()
    assert all(method in page for method in ("average", "individual", "ties", "dare"))


def test_another_launcher_gives_the_same_records_and_the_report(family, tmp_path):
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "two_processes.py").write_text(LAUNCHER)
    arguments = ["--config-dir", str(family / "conf"), "-m", "suite=tiny", "method=average,individual,ties"]
    arguments += ["wandb.mode=disabled"]
    here = command(*arguments, f"results_dir={tmp_path / 'here'}")
    assert here.returncode == 0, here.stderr
    launcher = ["hydra.launcher._target_=hydra_plugins.two_processes.TwoProcesses", "hydra.sweeper.max_batch_size=2"]
    there = command(*arguments, *launcher, f"results_dir={tmp_path / 'there'}", PYTHONPATH=str(tmp_path))
    assert there.returncode == 0, there.stderr
    assert [line for line in there.stdout.splitlines() if line.startswith("batch")] == ["batch of 2", "batch of 1"]
    assert numbers(tmp_path / "here") == numbers(tmp_path / "there") != {}
    assert "3 ok" in there.stdout
    assert (tmp_path / "there" / "reports" / "tiny" / "index.html").exists()
    found = sorted((tmp_path / "there" / "logs").rglob("outcome.json"))
    assert [file.parent.name for file in found] == ["0", "1", "2"]


def test_a_job_that_died_counts_as_failed_and_the_report_follows(family, tmp_path):
    arguments = ["--config-dir", str(family / "conf"), "-m", "suite=tiny", "method=ties,average"]
    arguments += ["wandb.mode=disabled", f"results_dir={tmp_path}"]
    start = [sys.executable, "-c", DYING, *arguments]
    done = subprocess.run(start, cwd=ROOT, env=OS_ENVIRON, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeError: the job is dead" in done.stderr
    assert "1 failed, 1 ok" in done.stdout
    assert {row["method"] for row in rows_of(tmp_path, status="ok")} == {"average"}
    assert (tmp_path / "reports" / "tiny" / "index.html").exists()
    planned = subprocess.run(
        [*start, "plan=true"], cwd=ROOT, env=OS_ENVIRON, capture_output=True, text=True, check=False
    )
    assert planned.returncode == 1 and "1 failed, 1 done" in planned.stdout


@pytest.mark.parametrize("size", ["0", "1.5", "all"])
def test_a_batch_has_at_least_one_job(size, tmp_path):
    done = command("-m", "method=ties,average", f"hydra.sweeper.max_batch_size={size}", f"results_dir={tmp_path / 'r'}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "hydra.sweeper.max_batch_size must be a whole number of at least 1 or null" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_optimizer_sees_the_validation_split_alone(family, tmp_path):
    for status in ("ok", "skipped"):
        done = commands.run(composed(family / "conf", tmp_path, "method=average", "split=validation"))
        assert done.status == status
        values = [row["value"] for row in rows_of(tmp_path, primary=True)]
        assert len(values) == len(CLASSES)
        assert float(done) == pytest.approx(sum(values) / len(values), abs=0)
    tested = commands.run(composed(family / "conf", tmp_path, "method=average"))
    for none in (tested, Outcome("failed")):
        with pytest.raises(Mistake, match="it takes split=validation, never the test"):
            float(none)
    assert json.dumps(done.score) != json.dumps(tested.score) == "null"


def test_a_limit_cuts_the_rows_of_the_split_that_is_scored(family, tmp_path):
    for split in ("test", "validation"):  # one process: a bench that served the one must not serve the other
        cfg = composed(family / "conf", tmp_path, "method=average", f"split={split}", "suite.limit=2")
        assert commands.run(cfg).status == "ok"
    assert {(row["split"], row["n"]) for row in rows_of(tmp_path)} == {("test", 2), ("validation", 2)}
    suite = OmegaConf.to_container(cfg, resolve=True)["suite"]
    whole, cut = (prepare.read(suite, split)["letters"].splits for split in ("test", "validation"))
    assert len(cut["validation"]) == 2 < len(whole["validation"]) and cut["train"].equals(whole["train"])
    assert cut["validation"].equals(whole["validation"].iloc[:2]) and len(cut["test"]) > len(whole["test"]) == 2
