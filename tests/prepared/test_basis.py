"""Singular vectors are computed once, and what happens to the files that keep them costs no run."""

import errno
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from twinbench.merging.compress import basis, svd
from twinbench.prepared import basis as prepared
from twinbench.prepared.basis import remembered
from twinbench.weights import disk_cache
from twinbench.weights.disk_cache import content_key
from twinbench.weights.parts import dense


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_factors_are_computed_once_and_shared_by_ranks(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(prepared, "basis", lambda matrix: asked.append(matrix.shape) or basis(matrix))
    tall, wide = draw(40, 12), draw(12, 40, seed=1)
    for matrix in (tall, wide):
        for rank in (12, 6, 1, 6):
            part = svd(matrix, rank, remembered(tmp_path, "cpu"))  # as another process would
            torch.testing.assert_close(dense(part), dense(svd(matrix, rank)), atol=1e-5, rtol=0)
    assert asked == [tall.shape, wide.shape]
    stored = remembered(tmp_path, "cpu")
    for matrix in (tall, wide):
        for found, expected in zip(svd(matrix, 6, stored), svd(matrix, 6), strict=True):
            assert torch.equal(found, expected), "to the last bit: a sweep must not depend on what was stored before"
    svd(tall + 1e-6, 3, remembered(tmp_path, "cpu"))
    assert len(asked) == 3, "another matrix is another key"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 64
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (flip, disk_cache.DAMAGED),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), disk_cache.DAMAGED),
        (lambda path: path.write_bytes(b""), disk_cache.DAMAGED),
        (lambda path: save_file({"rows": torch.zeros(12, 12)}, path), None),  # as they were kept without a hash
        (lambda path: (shutil.rmtree(path.parent), path.parent.touch()), "tensors are not kept (File exists)"),
        (lambda path: (path.unlink(), path.mkdir()), "tensors are not kept (Is a directory)"),
    ],
    ids=["bit flipped", "cut", "empty", "no hash", "a file", "a folder"],
)
def test_damage_to_the_cache_of_factors_costs_a_warning_and_the_work(tmp_path, capfd, monkeypatch, spoil, said):
    matrix, folder = draw(40, 12), tmp_path / "factors"
    expected = remembered(folder, "cpu")(matrix)
    spoil(folder / f"{content_key({'rows': matrix})}.safetensors")
    for _ in range(2):
        assert torch.equal(remembered(folder, "cpu")(matrix), expected)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(set(lines)) and all(line.startswith(f"{folder}: ") for line in lines)
    assert any(said in line for line in lines) if said else not lines
    if folder.is_dir() and "not kept" not in (said or ""):
        monkeypatch.setattr(prepared, "basis", None)  # what was computed again is kept
        assert torch.equal(remembered(folder, "cpu")(matrix), expected)


def test_factors_are_found_in_a_cache_that_is_full_or_read_only(tmp_path, capfd, monkeypatch):
    kept, new = draw(40, 12), draw(40, 12, seed=1)
    expected = remembered(tmp_path, "cpu")(kept)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(disk_cache, "save_file", refuse)
    asked = remembered(tmp_path, "cpu")
    assert torch.equal(asked(kept), expected)
    for _ in range(2):
        assert torch.equal(asked(new), basis(new))
    assert capfd.readouterr().err == f"{tmp_path}: tensors are not kept (Read-only file system)\n"


def test_old_factors_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_cache, "LIMIT", 3000)
    asked = remembered(tmp_path, "cpu")
    for seed in range(5):
        asked(draw(16, 16, seed=seed))  # about 1.1 kB each
    kept = {path.stem for path in tmp_path.iterdir()}
    assert kept == {content_key({"rows": draw(16, 16, seed=seed)}) for seed in (3, 4)}
