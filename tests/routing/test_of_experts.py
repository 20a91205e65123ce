"""What a router asks of the experts, beside slow references and at its limits, and whole runs that no rows train."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from baselines import dawin, mass, tsv_c
from support.commands import composed, rows_of
from support.family import CLASSES, bench, opened
from support.routing import USE, recipe
from twinbench.command import run
from twinbench.merging.compress import basis, svd
from twinbench.merging.merged import Merged, stored_bytes, with_route
from twinbench.merging.method import Method
from twinbench.plan.signature import learns
from twinbench.routing.features import read_names
from twinbench.routing.learned import Setting, applied, learned, router_bytes
from twinbench.routing.least import Least
from twinbench.routing.of_experts import entropies, residuals
from twinbench.routing.recipe import Features, Recipe, Use
from twinbench.routing.router import Router
from twinbench.system.mistakes import Mistake
from twinbench.weights.parts import LowRank
from twinbench.workbench import Workbench

QUERY = "encoder.layer.{}.attention.self.query.weight"  # what a layer of BERT runs first
NAMED = [task for task, classes in CLASSES.items() if classes]

DAWIN = Method("dawin", "dawin", lambda base, experts: dawin.merge(base, experts, scaling=0.3))
MASS = Method("mass", "mass", lambda base, experts: mass.merge(base, experts, basis=basis))


def beyond_half(base, experts) -> Merged:
    """Like Twin-Merging: a shared model beside which each expert has low-rank parts of another direction."""
    shared = {name: base[name] + sum(e[name] - base[name] for e in experts.values()) / 2 for name in base}
    parts = {t: {name: expert[name] - shared[name] for name in base} for t, expert in experts.items()}
    matrices = [name for name in base if base[name].dim() == 2]
    return Merged(shared, {t: own | {name: svd(own[name], 2, basis) for name in matrices} for t, own in parts.items()})


TWIN = Method("twin", "twin", beyond_half)


def asked(method: Method, source: str, layer: int | None, **use) -> Setting:
    """A run whose router asks the experts."""
    return Setting(
        method, "router", Recipe(Features(source, layer, "mean", 0, None), Least(1.0), Use(**USE | use)), None
    )


@pytest.fixture
def tiny(family) -> Workbench:
    return bench(opened(family), batch_size=4)


def low_rank(suite, rank: int) -> dict:
    """Each expert's change of all matrices, cut to a rank."""
    matrices = [name for name in suite.base if suite.base[name].dim() == 2]
    changes = {t: {name: state[name] - suite.base[name] for name in matrices} for t, state in suite.experts.items()}
    return {t: {name: svd(change, rank, basis) for name, change in own.items()} for t, own in changes.items()}


@torch.inference_mode()
def slow_residual(tiny: Workbench, task: str, row: int, layer: int, rank: int) -> list[float]:
    """One row, alone and unpadded, and the projection written out."""
    suite, spec = tiny.suite, tiny.suite.tasks[task]
    text = spec.splits["test"]["text"][row]
    batch = suite.tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
    x = tiny.module(**batch, output_hidden_states=True).hidden_states[layer][0].mean(0)
    found = []
    for state in suite.experts.values():
        name = QUERY.format(layer)
        _, _, vt = torch.linalg.svd(state[name] - suite.base[name])
        found.append((x - sum((x @ v) * v for v in vt[:rank])).norm().item())
    return found


@pytest.mark.parametrize("layer", [0, 1])
def test_residuals_are_those_of_a_projection_row_by_row(tiny, layer):
    exclusive = low_rank(tiny.suite, 3)
    for task in CLASSES:
        found = residuals(tiny, exclusive, task, "test", layer=layer, rows=None)
        with tiny.holding(dict(tiny.suite.base.items())):
            wanted = torch.tensor([slow_residual(tiny, task, row, layer, 3) for row in range(10)])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        some = residuals(tiny, exclusive, task, "test", layer=layer, rows=3)
        torch.testing.assert_close(some, found[:3], atol=1e-5, rtol=0)
    if layer == 1:
        last = residuals(tiny, exclusive, task, "test", layer=None, rows=None)
        assert torch.equal(last, found), "null is the last layer"


def test_nothing_lies_beyond_all_directions_and_everything_beyond_none(tiny):
    whole = low_rank(tiny.suite, 16)
    none = {name: {} for name in list(whole)[1:]}
    found = residuals(tiny, whole, "letters", "test", layer=1, rows=None)
    assert found.abs().max() < 1e-4
    some = residuals(tiny, {next(iter(whole)): whole[next(iter(whole))]} | none, "letters", "test", layer=1, rows=None)
    assert some[:, 0].max() < 1e-4 and some[:, 1:].min() > 0.1


def test_residuals_name_what_they_cannot_read(tiny):
    exclusive = low_rank(tiny.suite, 3)
    with pytest.raises(Mistake, match=r"router\.features\.layer must be in \[0, 1\] or null, got 2"):
        residuals(tiny, exclusive, "letters", "test", layer=2, rows=None)
    with pytest.raises(Mistake, match=f"no expert has a part of {QUERY.format(1)}"):
        residuals(tiny, {name: {} for name in exclusive}, "letters", "test", layer=1, rows=None)
    exclusive["colours"][QUERY.format(1)] = torch.ones(16, 16)
    with pytest.raises(Mistake, match=f"reads low-rank parts, and colours's of {QUERY.format(1)} is not"):
        residuals(tiny, exclusive, "letters", "test", layer=1, rows=None)


@pytest.mark.parametrize("task", NAMED)
def test_entropies_are_those_of_whole_experts_under_the_tasks_head(tiny, family, task):
    found = entropies(tiny, task, "test", rows=None)
    own = AutoModelForSequenceClassification.from_pretrained(family / "experts" / task).eval()
    for place, expert in enumerate(CLASSES):
        other = AutoModelForSequenceClassification.from_pretrained(family / "experts" / expert).eval()
        own.bert.encoder, own.bert.embeddings = other.bert.encoder, other.bert.embeddings  # the pooler is the head's
        for row in range(10):
            text = tiny.suite.tasks[task].splits["test"]["text"][row]
            batch = tiny.suite.tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
            with torch.inference_mode():
                p = own(**batch).logits[0].softmax(0)
            assert found[row, place].item() == pytest.approx(-sum(p * p.log()).item(), abs=1e-6)


def test_the_least_answer_has_the_largest_weight():
    answers = torch.tensor([[0.1, 0.7, 0.3], [2.0, 1.0, 1.0]])
    soft = Router(Least(1.0).ready(), Use(**USE))(answers)
    torch.testing.assert_close(soft, torch.exp(-answers) / torch.exp(-answers).sum(1, keepdim=True))
    one = Router(Least(0.5).ready(), Use(**USE | {"top_k": 1}))(answers)
    assert one[0].tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(Mistake, match=r"router\.model\.temperature must be above 0, got 0"):
        Least(0.0)


def test_mass_is_tsv_c_where_the_known_task_is_the_route(tiny):
    base, experts = dict(tiny.suite.base.items()), {t: dict(e.items()) for t, e in tiny.suite.experts.items()}
    ours, known = mass.merge(base, experts, basis=basis), tsv_c.merge(base, experts, basis=basis)
    assert isinstance(ours.exclusive["letters"][QUERY.format(0)], LowRank)
    for hot in torch.eye(3).tolist():
        first, second = with_route(ours, hot), with_route(known, hot)
        assert all(torch.equal(first[name], second[name]) for name in base)


def test_dawin_gives_back_the_expert_and_task_arithmetic(tiny):
    base, experts = dict(tiny.suite.base.items()), {t: dict(e.items()) for t, e in tiny.suite.experts.items()}
    alone = with_route(dawin.merge(base, experts, scaling=1 / 3), [0.0, 1.0, 0.0])
    equal = with_route(dawin.merge(base, experts, scaling=0.3), [1 / 3] * 3)
    for name in (name for name in base if base[name].is_floating_point()):
        torch.testing.assert_close(alone[name], experts["colours"][name])
        summed = sum(expert[name] - base[name] for expert in experts.values())
        torch.testing.assert_close(equal[name], base[name] + 0.3 * summed)
    with pytest.raises(ValueError, match="scaling must be finite"):
        dawin.merge(base, experts, scaling=float("nan"))


def test_each_row_goes_where_its_own_merge_and_its_own_layer_leave_least(tiny):
    """On one bench, which remembers: methods and layers whose answers differ, one after the other."""
    found = []
    for method, layer in ((MASS, 0), (MASS, 1), (TWIN, 0), (TWIN, 1), (MASS, 0)):
        made = method.merge(dict(tiny.suite.base.items()), {t: dict(e.items()) for t, e in tiny.suite.experts.items()})
        wanted = torch.cat([residuals(tiny, made.exclusive, t, "test", layer=layer, rows=None) for t in CLASSES])
        weights = torch.cat([applied(tiny, asked(method, "residuals", layer, top_k=1), t, "test") for t in CLASSES])
        assert torch.equal(weights.argmax(1), wanted.argmin(1)) and (weights.amax(1) == 1).all()
        found.append(torch.cat([applied(tiny, asked(method, "residuals", layer), t, "test") for t in CLASSES]))
        torch.testing.assert_close(found[-1], torch.softmax(-wanted, 1))
    assert all(not torch.equal(one, other) for n, one in enumerate(found[:4]) for other in found[:n])


def test_the_surer_an_expert_the_larger_its_weight(tiny):
    for task in NAMED:
        wanted = torch.softmax(-entropies(tiny, task, "test", rows=None), 1)
        torch.testing.assert_close(applied(tiny, asked(DAWIN, "entropies", None), task, "test"), wanted)
        torch.testing.assert_close(torch.softmax(-entropies(tiny, task, "test", rows=3), 1), wanted[:3])


def test_blocks_behind_the_one_that_is_read_do_not_run(tiny):
    """The second of two blocks has nothing to say to a router that reads the first one's input."""
    ran = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, n=n: ran.append(n))
        for n, block in enumerate(tiny.module.encoder.layer)
    ]
    residuals(tiny, low_rank(tiny.suite, 3), "letters", "test", layer=0, rows=4)
    assert set(ran) == {0}
    residuals(tiny, low_rank(tiny.suite, 3), "letters", "test", layer=None, rows=4)
    assert set(ran) == {0, 1}
    for hook in hooks:
        hook.remove()


def test_whole_experts_are_stored_unless_dense_parts_give_them_back(tiny):
    """A router of entropies keeps the experts' tensors that the merge cut to a rank or that it holds no part of."""
    few = Method("few", "few", lambda base, experts: Merged(base, {t: {} for t in experts}))
    for method in (DAWIN, MASS, few):
        setting = asked(method, "entropies", None)
        found = router_bytes(tiny, setting, learned(tiny, setting)[0], tiny.suite.base)
        wanted = 0
        for state in tiny.suite.experts.values():
            cut = {
                n: t
                for n, t in state.items()
                if not torch.equal(t, tiny.suite.base[n]) and (method is few or t.dim() > 1)
            }
            wanted += stored_bytes(cut)
        assert wanted > 10_000
        assert found == (0 if method is DAWIN else wanted) + stored_bytes({})


@pytest.mark.parametrize("layer", [0, None])
def test_the_base_that_residuals_go_through_is_stored_beside_another_shared_model(tiny, layer):
    """The embeddings and the blocks before the one that is read, where the shared model has other weights there."""
    setting = asked(TWIN, "residuals", layer)
    base, experts = dict(tiny.suite.base.items()), {t: dict(e.items()) for t, e in tiny.suite.experts.items()}
    shared = TWIN.merge(base, experts).shared
    read = read_names(tiny.module, 0 if layer == 0 else 1)
    beside = {f"base.{name}": base[name] for name in base if name in read and not torch.equal(base[name], shared[name])}
    assert len(beside) > 3
    assert router_bytes(tiny, setting, learned(tiny, setting)[0], shared) == stored_bytes(beside)


def test_a_setting_that_would_do_nothing_or_cannot_be_is_refused():
    use, mlp = Use(**USE), recipe().model
    Recipe(Features("residuals", 1, "mean", 0, None), mlp, use)  # rows may train a model on what the experts say
    for features, words in (
        (("base", 1, "mean", 0, None), "source must be residuals or entropies"),
        (("residuals", 1, "first", 0, None), "pool must be mean where"),
        (("entropies", 1, "mean", 0, None), "layer must be null where"),
        (("residuals", 1, "mean", 64, None), "characters must be 0"),
        (("residuals", 1, "mean", 0, 1000), "rows must be null"),
    ):
        with pytest.raises(Mistake, match=rf"router\.features\.{words}"):
            Recipe(Features(*features), Least(1.0), use)


def test_a_model_that_inherits_its_fit_still_learns(tmp_path, monkeypatch):
    (tmp_path / "mymodel.py").write_text(
        "from dataclasses import dataclass\nfrom twinbench.routing.prototypes import Prototypes\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(Prototypes):\n    temperature: float | None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert learns("mymodel.Mine") and learns("twinbench.routing.mlp.Mlp")
    assert not learns("twinbench.routing.least.Least")


def test_rows_whose_labels_tell_the_costs_of_routes_are_not_scored(family, tmp_path):
    more = ("method=mass", "router=mass", "router.features.layer=1", "router.use.minimum_risk=true")
    with pytest.raises(Mistake, match="scores the rows whose labels tell"):
        run(composed(family / "conf", tmp_path, *more, "split=validation"))


def test_no_rows_train_the_router_of_mass(family, tmp_path):
    more = ("method=mass", "router=mass", "router.features.layer=1")
    assert run(composed(family / "conf", tmp_path, *more)).status == "ok"
    assert run(composed(family / "conf", tmp_path, *more, "seed=1")).status == "skipped"
    assert run(composed(family / "conf", tmp_path, *more, "split=validation")).status == "ok", "it learned from no row"
    rows = rows_of(tmp_path, primary=True, split="test")
    assert {row["task"] for row in rows} == set(CLASSES)
    assert {(row["reads"], row["router"]["name"], row["seed"]) for row in rows} == {("nothing", "mass", None)}
    assert {row["router_bytes"] < 100 for row in rows} == {True}, "directions and base are stored already"


def test_dawin_runs_where_all_tasks_have_classes(family, tmp_path):
    more = ("method=dawin", "router=dawin")
    assert run(composed(family / "conf", tmp_path, *more, "suite.only=[letters,colours]")).status == "ok"
    rows = rows_of(tmp_path, primary=True)
    assert {row["task"] for row in rows} == set(NAMED) and {row["reads"] for row in rows} == {"nothing"}
    with pytest.raises(Mistake, match="under the known task's head, and protocol=blind knows no task"):
        run(composed(family / "conf", tmp_path, *more, "protocol=blind"))
    with pytest.raises(Mistake, match=r"and size has no classes there: leave it out with suite\.only"):
        run(composed(family / "conf", tmp_path, *more))


def test_a_set_of_the_family_has_different_answers(tiny):
    """A guard of this file: answers that were all alike would let any order pass."""
    assert entropies(tiny, "letters", "test", rows=None).std(1).min() > 1e-4
