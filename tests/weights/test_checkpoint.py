"""Streaming: what is written loads elsewhere, is whole or not there, and pieces change no number and cost no memory."""

import json
import os
import re
import subprocess
import sys
import time
from threading import Barrier

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from baselines import average, dare, dare_ties, model_stock, pcb, sce, task_arithmetic, ties
from support.commands import ROOT
from support.family import WORDS, tiny_config
from twinbench.merging.compress import bernoulli, generator
from twinbench.system.files import new_folder
from twinbench.system.memory import peak_memory
from twinbench.weights import state_dict
from twinbench.weights.parts import dense
from twinbench.weights.state_dict import StateDict, layout, read_checkpoint
from twinbench.weights.write import write_checkpoint, write_weights

MIXED = {
    "flag": torch.tensor([True, False, True]),
    "half": torch.linspace(-1, 1, 6).half().view(2, 3),
    "brain": torch.linspace(-1, 1, 5).bfloat16(),
    "single": torch.linspace(-1, 1, 12).view(3, 4),
    "positions": torch.arange(7),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
}
METHODS = {
    "average": lambda base, experts: average.merge(base, experts),
    "task_arithmetic": lambda base, experts: task_arithmetic.merge(base, experts, scaling=0.3),
    "dare": lambda base, experts: dare.merge(base, experts, density=0.3, scaling=0.3, seed=1),
    "ties": lambda base, experts: ties.merge(base, experts, density=0.2, scaling=1.0, scope="global", aggregate="mean"),
    "ties_tensor": lambda base, experts: ties.merge(
        base, experts, density=0.2, scaling=1.0, scope="tensor", aggregate="sum"
    ),
    "dare_ties": lambda base, experts: dare_ties.merge(
        base, experts, keep=0.5, density=0.2, scaling=1.0, scope="global", aggregate="mean", seed=1
    ),
    "pcb": lambda base, experts: pcb.merge(base, experts, density=0.3, clip=0.02, inter="sum", scaling=1.0),
    "sce": lambda base, experts: sce.merge(base, experts, density=0.4),
    "model_stock": lambda base, experts: model_stock.merge(base, experts),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layout_of(state, folder):
    save_file(state, folder / "model.safetensors")
    return layout(folder)


@pytest.fixture
def entries(tmp_path):
    (tmp_path / "source").mkdir()
    return layout_of(MIXED, tmp_path / "source")


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**9, 1), (40, 4), (1, 7)])
def test_every_dtype_and_shape_round_trips(tmp_path, entries, shard_bytes, files):
    out = tmp_path / "deep" / "out"
    write_checkpoint(out, MIXED, entries, shard_bytes=shard_bytes, metadata={"made_by": "test"})
    found = {}
    for path in out.glob("*.safetensors"):
        found |= load_file(path)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt", "made_by": "test"}, "transformers asks for the format"
    assert len(list(out.glob("*.safetensors"))) == files
    assert (out / "model.safetensors.index.json").exists() == (files > 1)
    assert found.keys() == MIXED.keys() == read_checkpoint(out).keys()
    for name, tensor in MIXED.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert layout(out) == entries
    if files > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in MIXED.values())
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing temporary is left"


@pytest.mark.parametrize("names", [list(MIXED), list(MIXED)[::-1], ["half", "flag", "single", "positions"]])
def test_every_tensor_lies_at_a_multiple_of_its_items_size(tmp_path, names):
    state = {name: MIXED[name] for name in names}
    (tmp_path / "source").mkdir()
    entries = layout_of(state, tmp_path / "source")
    entries = {name: entries[name] for name in names}
    for spare in range(8):  # whatever the length of the header
        out = tmp_path / f"out{spare}"
        write_checkpoint(out, state, entries, shard_bytes=10**9, metadata={"spare": "x" * spare})
        data = (out / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name, tensor in state.items():
            assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0, name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_in_every_piece(monkeypatch, bad):
    monkeypatch.setattr(state_dict, "PIECE", 4)
    state_dict.check_finite({"whole": torch.ones(11)}, "expert a")
    for at in range(11):
        tensor = torch.ones(11)
        tensor[at] = bad
        with pytest.raises(ValueError, match="expert a: NaN or infinite weights in layer"):
            state_dict.check_finite({"whole": torch.ones(11), "layer": tensor}, "expert a")


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_of_models_with_tied_weights_loads_with_plain_transformers(tmp_path, shard_bytes, dtype):
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(BertForMaskedLM(tiny_config()).to(dtype))
        models[-1].save_pretrained(tmp_path / str(seed))
    base, *experts = (read_checkpoint(tmp_path / str(seed)) for seed in range(3))
    assert "cls.predictions.decoder.weight" not in base, "tied to the embedding, stored once"
    merged = average.merge(base, dict(enumerate(experts))).shared
    with new_folder(tmp_path / "merged") as part:
        write_weights(part, merged, layout(tmp_path / "0"), shard_bytes=shard_bytes, metadata={})
        models[0].config.save_pretrained(part)
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    expected = BertForMaskedLM(tiny_config()).to(dtype).eval()
    halves = [model.state_dict() for model in models[1:]]
    expected.load_state_dict({n: ((halves[0][n].float() + halves[1][n].float()) / 2).to(dtype) for n in halves[0]})
    tokens = torch.arange(len(WORDS))[None, :20]
    assert layout(tmp_path / "merged") == layout(tmp_path / "0")
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits, atol=1e-5, rtol=0)


def test_to_ask_for_a_name_computes_nothing():
    asked = []
    state = StateDict(["a"], lambda name: asked.append(name) or torch.zeros(1))
    assert "a" in state and "b" not in state and list(state) == ["a"] and len(state) == 1
    assert not asked
    assert state["a"] is not None and asked == ["a"]
    with pytest.raises(KeyError):
        state["b"]


def test_tensors_are_asked_for_one_by_one(tmp_path):
    size, count = 2**21, 60  # 8 MiB each, 480 MiB in all
    entries = {f"layer{i}": ("F32", (size,)) for i in range(count)}
    state = StateDict(entries, lambda name: torch.full((size,), float(name.removeprefix("layer"))))
    with peak_memory("cpu") as before:
        torch.ones(size).sum()
    with peak_memory("cpu") as peak:
        write_checkpoint(tmp_path / "out", state, entries, shard_bytes=100 * 2**20, metadata={})
    assert peak.bytes - before.bytes < 240 * 2**20, "half of it: threads have heaps of their own, which keep some"
    assert float(read_checkpoint(tmp_path / "out")["layer59"][-1]) == 59.0


@pytest.mark.parametrize("there", ["file", "folder"])
def test_an_existing_target_is_refused_before_anything_is_computed(tmp_path, entries, there):
    out = tmp_path / "out"
    if there == "folder":
        out.mkdir()
    kept = out / "kept.txt" if there == "folder" else out
    kept.write_text("mine")
    asked = []
    state = StateDict(entries, lambda name: asked.append(name) or MIXED[name])
    with pytest.raises(FileExistsError, match="out exists and is not an empty folder"):
        write_checkpoint(out, state, entries, shard_bytes=10**9, metadata={})
    assert not asked and kept.read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {n: t for n, t in state.items() if n != "scalar"}, "only one of layout and weights has scalar"),
        (lambda state: state | {"more": torch.zeros(1)}, "only one of layout and weights has more"),
        (lambda state: state | {"single": state["single"].double()}, r"single: it is torch.float64 \[3, 4\]"),
        (lambda state: state | {"positions": state["positions"][1:]}, r"positions: it is torch.int64 \[6\]"),
    ],
)
def test_weights_unlike_the_layout_are_named_and_nothing_is_left(tmp_path, entries, change, words):
    with pytest.raises(ValueError, match=words):
        write_checkpoint(tmp_path / "new" / "out", change(dict(MIXED)), entries, shard_bytes=30, metadata={})
    assert not list((tmp_path / "new").iterdir())


def test_shards_of_no_bytes_are_refused(tmp_path, entries):
    with pytest.raises(ValueError, match="shard_bytes must be at least 1, got 0"):
        write_checkpoint(tmp_path / "out", MIXED, entries, shard_bytes=0, metadata={})


@pytest.mark.parametrize(("shard_bytes", "files"), [(17, 1), (16, 2)])
def test_a_shard_holds_so_many_bytes_and_none_more(tmp_path, shard_bytes, files):
    state = {"wide": torch.zeros(4), "narrow": torch.zeros(1, dtype=torch.uint8)}
    entries = {"wide": ("F32", (4,)), "narrow": ("U8", (1,))}
    write_checkpoint(tmp_path / "out", state, entries, shard_bytes=shard_bytes, metadata={})
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == files


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"a": ("F32", (2,))}, "x does not fit the base: it lacks b, c, d (+1 more)"),
        (dict.fromkeys("abcdefgh", ("F32", (2,))), "x does not fit the base: it has unknown f, g, h"),
        (dict.fromkeys("bcdez", ("F32", (2,))), "x does not fit the base: it lacks a and has unknown z"),
        (dict.fromkeys("abcde", ("F32", (2,))) | {"b": ("F16", (2,))}, "the base: b is F16 [2], not F32 [2]"),
        (dict.fromkeys("abcde", ("F32", (2, 1))), "not F32 [2]; c is F32 [2, 1], not F32 [2] (+2 more)"),
    ],
)
def test_layouts_that_differ_are_told_apart(other, words):
    reference = dict.fromkeys("abcde", ("F32", (2,)))
    state_dict.check_same_layout(reference, dict(reversed(reference.items())), "x")
    with pytest.raises(ValueError, match=re.escape(words) + "$"):
        state_dict.check_same_layout(reference, other, "x")


@pytest.fixture
def threads():
    """Sets torch's threads; what they were comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_an_error_in_a_thread_is_raised_as_itself_and_what_is_left_is_not_begun(tmp_path, threads):
    threads(3)
    entries = {f"layer{i:02}": ("F32", (100 - i,)) for i in range(100)}
    asked = []

    def tensor(name):
        asked.append(name)
        if name == "layer03":
            raise ZeroDivisionError("in layer03")
        time.sleep(0.005)
        return torch.zeros(entries[name][1])

    with pytest.raises(ZeroDivisionError, match="in layer03"):
        write_checkpoint(tmp_path / "new" / "out", StateDict(entries, tensor), entries, shard_bytes=10**9, metadata={})
    assert not list((tmp_path / "new").iterdir())
    assert len(asked) < 50
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("cores", [1, 3])
def test_threads_share_the_cores_and_keep_the_order(threads, cores):
    threads(cores)
    together = Barrier(cores, timeout=20)

    def cell(number):
        together.wait()  # as many at a time as there are cores
        return number, torch.get_num_threads()

    assert state_dict.concurrently(cell, range(cores)) == [(number, 1) for number in range(cores)]
    assert torch.get_num_threads() == cores


STATE = """
import os, resource, signal, sys, torch
from pathlib import Path
from twinbench.weights.write import write_checkpoint
from twinbench.weights.state_dict import StateDict
def tensor(name):
    if name == "layer3":
        {event}
    return torch.zeros(2 ** 20)
entries = {{f"layer{{i}}": ("F32", (2 ** 20,)) for i in range(6)}}
try:
    write_checkpoint(Path(sys.argv[1]), StateDict(entries, tensor), entries, shard_bytes={shard}, metadata={{}})
except OSError as error:
    sys.exit(f"error: {{error}}")
"""
FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 22, 2 ** 22))"


@pytest.mark.parametrize("shard", [2**22, 10**9])
@pytest.mark.parametrize("event", [FULL, "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_write_that_is_refused_or_killed_leaves_nothing_under_the_final_name(tmp_path, event, shard):
    script = STATE.format(event=event, shard=shard)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert not (tmp_path / "out").exists()
    if event == FULL:
        assert "out could not be written, and nothing is left of it: File too large" in done.stderr
        assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next_and_nothing_else_is(tmp_path):
    kept = [tmp_path / name for name in (".out", ".out-1", ".outer-elsewhere-1-00000000", ".out-elsewhere-1-00000000")]
    for folder in kept:
        folder.mkdir()
    script = STATE.format(event='print("there", flush=True); sys.stdin.read()', shard=10**9)
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    environ = {**os.environ, "TQDM_DISABLE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"there\n"
        (left,) = tmp_path.glob(f".out-*-{process.pid}-*")
        with new_folder(tmp_path / "out"):
            pass
        assert (left / "model.safetensors").exists(), "its process is at work"
    finally:
        process.kill()
        process.communicate()
    assert left.exists()
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "out"])


def test_a_disk_that_fills_up_is_one_error_and_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a file system of 24 MiB can only be mounted by root")
    try:
        entries = {f"layer{i}": ("F32", (2**20,)) for i in range(8)}
        state = StateDict(entries, lambda name: torch.zeros(2**20))
        with pytest.raises(OSError, match="out could not be written, and nothing is left of it: No space left"):
            write_checkpoint(disk / "out", state, entries, shard_bytes=10**9, metadata={})
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def sharded(tmp_path):
    out = tmp_path / "sharded"
    state = {f"layer{i}": torch.full((4,), float(i)) for i in range(4)}
    entries = dict.fromkeys(state, ("F32", (4,)))
    write_checkpoint(out, state, entries, shard_bytes=32, metadata={})
    return out


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("read", [read_checkpoint, layout])
def test_an_index_and_shards_that_disagree_are_named(sharded, read):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    edit_index(sharded, lambda places: places.update(ghost=first))
    with pytest.raises(ValueError, match=f"its index places ghost in {first}, which does not hold it"):
        read(sharded)
    edit_index(sharded, lambda places: (places.pop("ghost"), places.pop("layer1")))
    with pytest.raises(ValueError, match=f"{first} holds layer1, which its index does not place there"):
        read(sharded)
    edit_index(sharded, lambda places: (places.pop("layer0"), places))
    with pytest.raises(ValueError, match=f"its index does not name the shard {first}"):
        read(sharded)
    index = (sharded / "model.safetensors.index.json").read_bytes()
    for outside in ("../secret.safetensors", "/etc/secret.safetensors", f"sub/{first}", 3):
        edit_index(sharded, lambda places, outside=outside: places.update(layer2=outside))
        with pytest.raises(ValueError, match=f"weight_map must name files beside it, got {outside}"):
            read(sharded)
    (sharded / "model.safetensors.index.json").write_bytes(index)
    (sharded / second).unlink()
    with pytest.raises(FileNotFoundError, match=f"its index names {second}, which is not there"):
        read(sharded)
    for broken in ("{", "[]", '{"metadata": {}}'):
        (sharded / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(ValueError, match="not an index of shards"):
            read(sharded)


@pytest.mark.parametrize("edit", [lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:5]])
def test_a_shard_of_the_wrong_size_is_named(sharded, edit):
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: truncated, or not"):
        read_checkpoint(sharded)


def family(dtype=torch.float32):
    shapes = {"embed": (30, 8), "up": (12, 8), "bias": (12,), "scale": ()}
    base = {name: draw(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(shapes.items())}
    experts = {
        f"task{t}": {n: (v.float() + 0.1 * draw(*v.shape, seed=10 * t + len(n))).to(dtype) for n, v in base.items()}
        for t in range(1, 4)
    }
    positions = {"positions": torch.arange(5)}
    return base | positions, {task: state | {"positions": torch.arange(5) + 9} for task, state in experts.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_pieces_changes_nothing_and_integers_are_the_base(monkeypatch, method, dtype):
    base, experts = family(dtype)
    whole = dict(METHODS[method](base, experts).shared)
    for module in (state_dict, dare, ties, sce):
        monkeypatch.setattr(module, "PIECE", 7)
    pieces = dict(METHODS[method](base, experts).shared)
    for name, tensor in whole.items():
        assert tensor.dtype == base[name].dtype
        torch.testing.assert_close(pieces[name], tensor, atol=1e-6, rtol=0)
    assert torch.equal(pieces["positions"], base["positions"])


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_threads_changes_nothing(monkeypatch, tmp_path, threads, method):
    base, experts = family()
    (tmp_path / "base").mkdir()
    entries = layout_of(base, tmp_path / "base")
    for module in (state_dict, dare, ties, sce):
        monkeypatch.setattr(module, "PIECE", 64)
    for cores in (1, 2, 5):
        threads(cores)
        merged = METHODS[method](base, experts).shared
        write_checkpoint(tmp_path / str(cores), merged, entries, shard_bytes=10**9, metadata={})
    one, two, five = ((tmp_path / str(cores) / "model.safetensors").read_bytes() for cores in (1, 2, 5))
    assert one == two == five
    assert not torch.equal(read_checkpoint(tmp_path / "1")["embed"], base["embed"])


def test_dare_ties_is_ties_of_what_dare_left():
    base, experts = family()
    whole = dare.drop_and_rescale(base, experts, 0.5, 1)
    for scope in ("global", "tensor"):
        settings = {"density": 0.2, "scaling": 0.7, "scope": scope, "aggregate": "mean"}
        expected = ties.merge(base, whole, **settings).shared
        found = dare_ties.merge(base, experts, keep=0.5, seed=1, **settings).shared
        assert all(torch.equal(found[name], expected[name]) for name in base)


def test_what_dare_left_is_not_rounded_to_the_experts_dtype():
    base, experts = family(torch.bfloat16)
    left = dare.drop_and_rescale(base, experts, 0.5, 0)
    for task, expert in experts.items():
        moved, whole = (state["embed"].float() - base["embed"].float() for state in (left[task], expert))
        assert 0.3 < (moved != 0).float().mean() < 0.7
        torch.testing.assert_close(moved, 2 * whole * (moved != 0), atol=1e-6, rtol=1e-5)


def test_dare_draws_the_masks_of_bernoulli():
    base, experts = family()
    merged = dare.merge(base, experts, density=0.3, scaling=0.5, seed=4).shared
    for name in ("embed", "bias"):
        deltas = [
            dense(bernoulli(expert[name] - base[name], 0.3, generator(4, task, name)))
            for task, expert in experts.items()
        ]
        torch.testing.assert_close(merged[name], base[name] + 0.5 * sum(deltas), atol=1e-6, rtol=0)


@pytest.mark.parametrize("density", [0.001, 0.05, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["normal", "misleading", "zeros", "equal", "few values"])
def test_the_threshold_is_exact_whatever_the_sample_says(monkeypatch, kind, density):
    monkeypatch.setattr(ties, "SAMPLE", 50)
    monkeypatch.setattr(ties, "PIECE", 1000)
    values = draw(10_000)
    if kind == "misleading":
        values[:: 10_000 // 50 | 1] *= 1e6  # exactly what the sample looks at
    elif kind == "zeros":
        values[1000:] = 0.0
    elif kind == "equal":
        values = torch.full_like(values, -0.5)
    elif kind == "few values":
        values = values.sign() * values.abs().round()
    expected = values.abs().sort(descending=True).values[max(1, round(density * len(values))) - 1]
    parts = {"a": values[:3000], "b": values[3000:3001], "c": values[3001:].view(-1, 1)}
    assert ties.kept_above(parts, density) == expected
    origin = {name: torch.ones_like(part) for name, part in parts.items()}
    shifted = {name: part + 1 for name, part in parts.items()}
    rounded = torch.cat([(shifted[name] - origin[name]).abs().flatten() for name in parts]).sort(descending=True)
    assert ties.kept_above(shifted, density, origin) == rounded.values[max(1, round(density * len(values))) - 1]
