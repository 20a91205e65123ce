"""Whether a run had the machine to itself is measured: what others use counts, and what the run uses does not."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from twinbench.system.load import others

BUSY = "import time\nend = time.time() + 1\nwhile time.time() < end: pass"
FOREIGN = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {BUSY!r}], start_new_session=True)"


@pytest.mark.skipif(sys.platform != "linux", reason="a process whose parent has ended belongs to nobody there")
def test_a_process_that_is_not_ours_is_seen():
    with others() as found:
        subprocess.run([sys.executable, "-c", FOREIGN], check=True)  # its child outlives it, and is not ours any more
        time.sleep(1)
    assert found.share > 0.2 / os.cpu_count()


def test_our_own_work_and_that_of_our_processes_is_not_the_others():
    before, start = psutil.Process().cpu_times(), time.time()
    with others() as found:
        for busy in [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count())]:
            busy.wait()
    after, seconds = psutil.Process().cpu_times(), time.time() - start
    ours = (after.children_user - before.children_user) / seconds / os.cpu_count()
    assert ours > 0.1, "they have worked"
    assert found.share < 1 - ours + 0.1
