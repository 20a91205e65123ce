"""Routed inference on tiny models of many architectures equals the dense merge, as docs/architectures.md says."""

import architectures
import pytest
import torch
from architectures import EXPERTS, TABLE, TOLERANCE, WEIGHTS, Case, built, experts_of, load, random_batch, tried

from twinbench.merging.merged import Merged
from twinbench.routing.attach import attach


def rows_of_the_table() -> dict[Case, tuple[bool, str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.read_text().splitlines() if "|" in line]
    return {Case(name, kind): (works == "yes", why) for name, kind, works, _, _, why in cells[2:]}


def test_the_table_has_every_case():
    assert list(rows_of_the_table()) == architectures.cases()


@pytest.mark.parametrize("case", architectures.cases(), ids=lambda case: f"{case.name}, {case.kind}")
def test_routed_logits_equal_the_dense_merge_or_are_refused(case):
    outcome, (works, why) = tried(case), rows_of_the_table()[case]
    assert (outcome.refused or "") == why and works == (not why)
    if works:
        assert outcome.error < TOLERANCE
        assert outcome.effect > 1000 * TOLERANCE, "the parts matter here"


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-2", "OPT", "Falcon", "Cohere", "Mixtral"])
@torch.inference_mode()
def test_every_routed_row_writes_what_its_dense_merge_does(name):
    model, backbone = built(Case(name, "causal, tied"))
    shared, parts = experts_of(backbone)
    batch = random_batch(causal=True)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    expected = []
    for row, weights in enumerate(WEIGHTS.tolist()):
        load(backbone, shared, parts, weights)
        expected.append(model.generate(**{k: v[row : row + 1] for k, v in batch.items()}, **settings))
    load(backbone, shared, parts, [0.0] * EXPERTS)
    with attach(backbone, Merged({}, {str(t): expert for t, expert in enumerate(parts)})) as routes:
        routes.weights = WEIGHTS
        got = model.generate(**batch, **settings)
    assert torch.equal(got, torch.cat(expected))
