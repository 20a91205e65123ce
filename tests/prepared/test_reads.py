"""A plan knows from the folder's files what a method may ask for and which data that reads, without importing them."""

import importlib

import pytest

from twinbench.plan.signature import NAMED, PREPARED, READS, most_read, prepared_reads, signature


def test_every_file_prepares_an_argument_and_says_what_it_reads():
    assert "basis" in NAMED and NAMED < PREPARED
    for name in NAMED:
        module = importlib.import_module(f"twinbench.prepared.{name}")
        assert callable(module.prepare)
        assert prepared_reads(name) == module.READS and module.READS in READS


def test_a_method_reads_what_its_arguments_read():
    assert signature("baselines.ties.merge").reads == "nothing"
    assert signature("twinbench.merging.twin_merging.merge").reads == prepared_reads("basis") == "nothing"


@pytest.mark.parametrize("most", range(4))
def test_of_several_needs_the_largest_counts(most):
    assert most_read(READS[: most + 1]) == most_read(reversed(READS[: most + 1])) == READS[most]
    assert most_read([]) == "nothing"
