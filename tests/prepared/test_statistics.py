"""Fisher information and Gram matrices against plain loops over rows that are never padded; and their files."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from support.family import CLASSES, bench, opened
from twinbench.prepared import fisher, gram, means, prefix_gram
from twinbench.system import source
from twinbench.weights import disk_cache

ROWS = 7


@pytest.fixture
def suite(family, tmp_path, monkeypatch):
    monkeypatch.setenv("TWINBENCH_CACHE", str(tmp_path / "cache"))
    return opened(family)


def whole(family, suite, expert: str):
    """The expert as transformers opens it, and its first training rows, each alone."""
    model = BertForSequenceClassification.from_pretrained(family / "experts" / expert).eval()
    words = AutoTokenizer.from_pretrained(family / "base")
    texts = suite.tasks[expert].splits["train"]["text"][:ROWS]
    rows = [words(text, truncation=True, max_length=16, return_tensors="pt") for text in texts]
    assert len({row["input_ids"].shape for row in rows}) > 2, "padding would matter"
    return model, rows


@pytest.mark.parametrize("expert", CLASSES)
def test_fisher_is_the_mean_of_each_rows_expected_squared_gradient(family, suite, expert):
    model, rows = whole(family, suite, expert)
    wanted = {name: torch.zeros_like(parameter) for name, parameter in model.bert.named_parameters()}
    for row in rows:
        logits = model(**row).logits[0]
        chances = logits.softmax(0).tolist() if CLASSES[expert] else [1.0]
        for label, chance in enumerate(chances):
            model.zero_grad()
            logits = model(**row).logits[0]
            (logits.log_softmax(0) if CLASSES[expert] else logits)[label].backward()
            for name, parameter in model.bert.named_parameters():
                wanted[name] += chance * parameter.grad**2 / ROWS
    found = dict(fisher.prepare(bench(suite, 5))(expert, ROWS))
    assert found.keys() == suite.base.keys(), "what is merged, and so no pooler"
    largest = max(float(tensor.max()) for tensor in found.values())
    for name, tensor in found.items():
        assert tensor.max() > 0 and tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6 * largest, rtol=1e-4)


def test_fisher_leaves_the_module_as_it_was(suite):
    own = bench(suite, 5)
    with torch.no_grad():
        assert fisher.prepare(own)("letters", 1)["embeddings.LayerNorm.bias"].shape == (16,)
    for parameter in own.module.parameters():
        assert parameter.grad is None and not parameter._post_accumulate_grad_hooks
    assert not any(getattr(child, "sparse", False) for child in own.module.modules())


@pytest.mark.parametrize("expert", CLASSES)
def test_gram_is_the_mean_outer_product_of_a_layers_inputs(family, suite, expert):
    model, rows = whole(family, suite, expert)
    seen = {}
    for name, layer in model.bert.encoder.named_modules():
        if isinstance(layer, torch.nn.Linear):
            inputs = seen.setdefault(f"encoder.{name}.weight", [])
            layer.register_forward_hook(lambda _, given, out, inputs=inputs: inputs.append(given[0][0].detach()))
    for row in rows:
        model(**row)
    found = {size: dict(gram.prepare(bench(suite, size))(expert, ROWS)) for size in (1, 5)}
    assert found[5].keys() == seen.keys(), "linear layers of what is merged"
    for name, inputs in seen.items():
        x = torch.cat(inputs)
        assert len(x) == sum(row["input_ids"].numel() for row in rows)
        torch.testing.assert_close(found[5][name], x.T @ x / len(x), atol=1e-6, rtol=1e-5)
        assert torch.equal(found[5][name], found[1][name]), "remembered"
    averages = dict(means.prepare(bench(suite, 5))(expert, ROWS))
    assert averages.keys() == seen.keys()
    for name, inputs in seen.items():
        wanted = torch.stack([text.mean(0) for text in inputs]).mean(0)
        torch.testing.assert_close(averages[name], wanted, atol=1e-6, rtol=1e-5)


def test_prefix_gram_leaves_out_what_is_no_linear_layer(suite):
    """A position bias in a block is an embedding, and its inputs have no second moments."""
    ask, table = prefix_gram.prepare(bench(suite)), "embeddings.position_embeddings.weight"
    state, expert = dict(suite.base), next(iter(suite.experts))
    layer = "encoder.layer.0.output.dense.weight"
    assert ask(state, expert, 4, [table]) == {}
    assert ask(state, expert, 4, [table, layer]).keys() == {layer}


def test_prefix_gram_is_gram_under_the_experts_own_weights_and_another_under_others(suite):
    own = bench(suite, 3)
    wanted = dict(gram.prepare(own)("colours", ROWS))
    names = [name for name in wanted if "layer.0" in name]
    ask = prefix_gram.prepare(own)
    found = ask(suite.experts["colours"], "colours", ROWS, names)
    assert list(found) == names
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-5)
    upper = [name for name in wanted if "layer.1" in name]
    other = ask(suite.experts["letters"], "colours", ROWS, upper)
    assert all(not torch.allclose(other[name], wanted[name], rtol=1e-3) for name in upper)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7])
def test_padding_does_not_matter(suite, batch_size):
    linear = {f"{n}.weight": m for n, m in bench(suite).module.named_modules() if isinstance(m, torch.nn.Linear)}
    layers = {name: layer for name, layer in linear.items() if name in suite.base}
    one, found = (gram.grams(bench(suite, size), "colours", ROWS, layers) for size in (1, batch_size))
    for name in layers:
        torch.testing.assert_close(found[name], one[name], atol=1e-6, rtol=1e-5)


def test_a_layer_whose_padding_is_not_known_is_named():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    inputs, kept = torch.arange(12.0).view(2, 3, 2), [[0, 1], [2, 3], [6, 7]]
    assert gram._without_padding("up", inputs, mask).tolist() == kept
    assert gram._without_padding("up", inputs.flatten(0, 1), mask).tolist() == kept
    assert torch.equal(gram._without_padding("pooler", inputs[:, 0], mask), inputs[:, 0])
    with pytest.raises(ValueError, match=r"gram: up sees 4 rows of \(2, 3\) tokens"):
        gram._without_padding("up", torch.zeros(2, 2, 2), mask)


@pytest.mark.parametrize(("argument", "measure"), [(fisher, "diagonal"), (gram, "grams"), (means, "mean_inputs")])
def test_statistics_are_measured_once_for_the_same_expert_and_rows(suite, monkeypatch, argument, measure):
    name, runs, real = "encoder.layer.0.output.dense.weight", [], getattr(argument, measure)
    monkeypatch.setattr(argument, measure, lambda *given: runs.append(given[1:3]) or real(*given))
    for _ in range(2):  # as another process would
        asked = argument.prepare(bench(suite, 5))("size", ROWS)
        assert not runs or _, "nothing is measured before a tensor is read"
        first = asked[name]
        assert torch.equal(argument.prepare(bench(suite, 5))("size", ROWS)[name], first)
    assert runs == [("size", ROWS)]
    argument.prepare(bench(suite, 5))("size", ROWS - 1)[name]
    moved = dict(suite.experts) | {"size": {n: t * 1.01 for n, t in suite.experts["size"].items()}}
    argument.prepare(bench(replace(suite, experts=moved)))("size", ROWS)[name]
    other = dict(suite.heads) | {"size": {n: t * 1.01 for n, t in suite.heads["size"].items()}}
    argument.prepare(bench(replace(suite, heads=other)))("size", ROWS)[name]
    assert runs == [("size", ROWS), ("size", ROWS - 1), ("size", ROWS), ("size", ROWS)]


@pytest.mark.parametrize(("argument", "measure"), [(fisher, "diagonal"), (gram, "grams"), (means, "mean_inputs")])
def test_statistics_are_measured_anew_for_other_code_or_another_dtype(suite, monkeypatch, argument, measure):
    name, runs, real = "encoder.layer.0.output.dense.weight", [], getattr(argument, measure)
    monkeypatch.setattr(argument, measure, lambda *given: runs.append(1) or real(*given))
    digest = source.digest
    for changed in ("", "statistics.py", "_remembered.py", f"{argument.__name__.rpartition('.')[2]}.py"):
        monkeypatch.setattr(source, "digest", lambda file, changed=changed: digest(file) + str(file.name == changed))
        argument.prepare(bench(suite))("size", ROWS)[name]
        argument.prepare(bench(suite))("size", ROWS)[name]
    argument.prepare(bench(replace(suite, dtype="bfloat16")))("size", ROWS)[name]
    assert len(runs) == 5


def test_a_damaged_file_costs_a_warning_and_the_work(suite, tmp_path, capfd):
    name, folder = "encoder.layer.1.output.dense.weight", tmp_path / "cache" / "gram"
    first = {n: t.clone() for n, t in gram.prepare(bench(suite, 5))("size", ROWS).items()}  # out of the file
    (file,) = folder.glob(f"*-{name}.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    again = dict(gram.prepare(bench(suite, 5))("size", ROWS))
    assert first.keys() == again.keys() and all(torch.equal(first[n], again[n]) for n in first)
    assert capfd.readouterr().err.count(disk_cache.DAMAGED) == 1


def test_what_cannot_be_kept_is_measured_once_all_the_same(suite, monkeypatch, capfd, tmp_path):
    (tmp_path / "cache").write_text("a file")
    runs, real = [], gram.grams
    monkeypatch.setattr(gram, "grams", lambda *given: runs.append(1) or real(*given))
    assert len(dict(gram.prepare(bench(suite, 5))("size", ROWS))) == 12
    assert runs == [1]
    assert "tensors are not kept" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (fisher, r"task letters: rows must be in \[1, 20\], the rows of its train split; got 21"),
        (gram, r"task letters: rows must be in \[1, 20\]"),
    ],
)
def test_more_rows_than_there_are_cannot_be_measured(suite, argument, words):
    with pytest.raises(ValueError, match=words):
        argument.prepare(bench(suite, 5))("letters", 21)


def test_a_label_that_an_expert_rules_out_has_no_information(suite):
    sure = {name: 1e3 * tensor for name, tensor in suite.heads["letters"].items()}  # p is 1 and 0, log p about -1e4
    found = fisher.prepare(bench(replace(suite, heads={**suite.heads, "letters": sure})))("letters", ROWS)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
