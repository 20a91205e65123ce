"""Claims between real processes: who has to wait, who is told, and what a killed process leaves."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import ROOT
from twinbench.system.cached import made
from twinbench.system.claims import claimed

HOLD = """
import sys
from pathlib import Path
from twinbench.system.claims import claimed

with claimed(Path(sys.argv[1]), wait=False) as other:
    print(other, flush=True)
    sys.stdin.read()
"""
MAKE = """
import sys, time
from pathlib import Path
from twinbench.system.cached import made

folder, log = Path(sys.argv[1]), Path(sys.argv[2])

def make(part):
    with log.open("a") as stream:
        stream.write("made\\n")
    time.sleep(2)
    (part / "a.txt").write_text("A")

print("ready", flush=True)
sys.stdin.readline()
assert (made(folder, make) / "a.txt").read_text() == "A"
"""


def process(code: str, *arguments: Path) -> subprocess.Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, text=True, **pipes)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the claim on `tmp_path/thing`."""
    held = process(HOLD, tmp_path / "thing")
    assert held.stdout.readline() == "None\n"
    yield held
    held.kill()
    held.communicate()


def test_a_claim_is_held_once_and_says_by_whom(holder, tmp_path):
    with claimed(tmp_path / "thing", wait=False) as other:
        assert other == f"process {holder.pid} on {socket.gethostname()}"
    with claimed(tmp_path / "another thing", wait=False) as other:
        assert other is None
    holder.communicate("")
    assert holder.returncode == 0
    with claimed(tmp_path / "thing", wait=False) as other:
        assert other is None
    assert not list(tmp_path.iterdir())


def test_the_claim_of_a_killed_process_is_taken_over(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".thing.claim").exists()
    with claimed(tmp_path / "thing", wait=False) as other:
        assert other is None
        assert (tmp_path / ".thing.claim").read_text().split()[0] == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_abandoned_claims_are_removed_and_held_ones_stay(holder, tmp_path):
    (tmp_path / ".long ago.claim").write_text(f"{holder.pid}\nanother-host\n")
    with claimed(tmp_path / "another thing", wait=False):
        assert {path.name for path in tmp_path.iterdir()} == {".thing.claim", ".another thing.claim"}
    with claimed(tmp_path / "thing", wait=False) as other:
        assert str(holder.pid) in other


def test_an_error_gives_a_claim_up(tmp_path):
    with pytest.raises(KeyError), claimed(tmp_path / "thing", wait=True):
        raise KeyError
    with claimed(tmp_path / "thing", wait=False) as other:
        assert other is None


def test_of_many_processes_one_makes_a_folder_and_the_others_wait_for_it(tmp_path):
    """All begin within the two seconds that making takes."""
    folder, log = tmp_path / "cache" / "folder", tmp_path / "log"
    makers = [process(MAKE, folder, log) for _ in range(4)]
    for maker in makers:
        assert maker.stdout.readline() == "ready\n"
    for maker in makers:
        maker.stdin.write("\n")
        maker.stdin.flush()
    said = [maker.communicate(timeout=60)[1] for maker in makers]
    assert [maker.returncode for maker in makers] == [0] * 4, said
    assert log.read_text() == "made\n"
    (first,) = [maker for maker, lines in zip(makers, said, strict=True) if not lines]
    for lines in sorted(said)[1:]:
        assert lines.startswith(f"{folder}: waiting for process ") and lines.count("\n") == 1
    assert any(f"process {first.pid} on {socket.gethostname()}" in lines for lines in said)
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_a_folder_whose_maker_was_killed_is_made(tmp_path):
    killed = process(
        MAKE.replace("time.sleep(2)", "print('half', flush=True); time.sleep(60)"), tmp_path / "a", tmp_path / "log"
    )
    killed.stdin.write("\n")
    killed.stdin.flush()
    assert [killed.stdout.readline() for _ in range(2)] == ["ready\n", "half\n"]
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert len(list(tmp_path.glob(".a*"))) == 2, "a half-made folder and a claim"
    made(tmp_path / "a", lambda part: (part / "b.txt").touch())
    assert {path.name for path in tmp_path.iterdir()} == {"a", "log"}
