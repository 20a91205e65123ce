"""The generative half on a tiny Llama with LoRA experts and small documents: lm-eval scores, prompts are routed."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from baselines import individual, pretrained, task_arithmetic, ties
from support.commands import OS_ENVIRON, command
from support.language import TASKS, byte_tokenizer, documents, sentence
from twinbench.merging import twin_merging
from twinbench.merging.compress import basis
from twinbench.merging.merged import Merged, with_route
from twinbench.merging.method import Method
from twinbench.records import store
from twinbench.routing import features, learned
from twinbench.routing.batch import merges_each
from twinbench.routing.learned import Setting
from twinbench.routing.mlp import Mlp
from twinbench.routing.recipe import Features, Recipe, Use
from twinbench.suite import Suite, Task
from twinbench.workbench import Workbench, merged
from twinbench.workloads.generation import attention, likelihood, workload
from twinbench.workloads.generation import data as language
from twinbench.workloads.generation import finetune as instruct
from twinbench.workloads.generation import score as scoring
from twinbench.workloads.generation.open import module, open_suite, open_tokenizer

ROWS = {"train": 10, "validation": 6, "test": 5}


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    """A folder with `base`, `experts/TASK` (LoRA adapters) and `data/TASK`. Do not write to it."""
    root = tmp_path_factory.mktemp("causal")
    documents(root / "data")
    tokens = byte_tokenizer()
    tokens.save_pretrained(root / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": len(tokens)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.3, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(root / "base")
    for task in TASKS:
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), lora)
        model.save_pretrained(root / "experts" / task)
    return root


def load_task(family: Path, name: str, **changes) -> Task:
    given = {"lm_eval": f"twinbench_{name}", "metrics": TASKS[name], "max_length": 3000, "rows": ROWS}
    sources = {"folder": family / "data" / name}
    return language.load_task(name, language.Spec(**given | changes), sources, open_tokenizer(family / "base"))


def opened(family: Path, tasks: dict[str, Task], *, factored: bool = False, **folders: Path) -> Suite:
    """The suite of some tasks with their experts, or with those in other folders."""
    settings = {"name": "tiny", "merged": list(tasks), "factored": factored, "dtype": "float32", "device_map": None}
    experts = {name: family / "experts" / name for name in tasks} | folders
    return open_suite(family / "base", experts, tasks, open_tokenizer(family / "base"), settings, workload)


def bench_of(suite: Suite, batch_size: int = 4) -> Workbench:
    return Workbench(suite, "cpu", batch_size, 10**9, "float32")


@pytest.fixture(scope="module")
def suite(family) -> Suite:
    return opened(family, {name: load_task(family, name) for name in TASKS})


@pytest.fixture(scope="module")
def bench(suite) -> Workbench:
    return bench_of(suite)


ARITHMETIC = Method("arithmetic", "arithmetic", partial(task_arithmetic.merge, scaling=0.3))
BASE = Method("base", "base", pretrained.merge)
INDIVIDUAL = Method("individual", "individual", individual.merge, route="task", factored=individual.factored)


def twin(**changes) -> Method:
    """Twin-Merging as `run.py` binds it."""
    settings = {"compression": "svd", "rank_ratio": 0.2, "density": None, "seed": 0, "basis": basis} | changes
    forms = [partial(form, **settings) for form in (twin_merging.merge, twin_merging.factored)]
    return Method(f"twin {changes}", "twin_merging", forms[0], None, "router", ARITHMETIC, forms[1])


def routed(epochs: int = 5, lr: float = 5e-4) -> Setting:
    """Twin-Merging under a small router."""
    features, use = Features("shared", None, "mean", 0, None), Use(None, None, False, 0.0)
    return Setting(twin(), "router", Recipe(features, Mlp(2.0, 0.5, lr, epochs, 16, False), use), 0)


def answered(results: dict) -> list:
    """Log-likelihoods or texts of every document, in order."""
    ((_, samples),) = results["samples"].items()
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def by_hand(model, family: Path, scored, **changes) -> dict:
    """What lm-eval's own HFLM says of a model."""
    served = HFLM(model.eval(), tokenizer=open_tokenizer(family / "base"), batch_size=2, max_length=3000)
    flags = {"apply_chat_template": True, "fewshot_as_multiturn": True, "bootstrap_iters": 0}
    return evaluate(served, {"tasks": {"t": scored}, "groups": {}, "group_map": {}}, **flags | changes)


def assert_answers_equal(got: list, wanted: list) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        if isinstance(ours[0], str):
            assert ours == theirs
        else:
            assert np.allclose([pair[0] for pair in ours], [pair[0] for pair in theirs], atol=1e-3)
            assert [pair[1] for pair in ours] == [pair[1] for pair in theirs]


@pytest.mark.parametrize("task", TASKS)
def test_an_expert_scores_as_lm_eval_scores_its_adapter(family, suite, bench, task):
    """The individual model here, against lm-eval's own HFLM on base and adapter, as `lm_eval --model hf` runs them."""
    asked = (bench, Setting(INDIVIDUAL, "task"), task, "test")
    values, frame, _, further = scoring.score(*asked, None)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(family / "base"), family / "experts" / task)
    results = by_hand(model, family, suite.tasks[task].harness["test"])
    for metric in TASKS[task]:
        assert values[metric] == pytest.approx(results["results"]["t"][f"{metric},none"], abs=1e-6)
    assert_answers_equal(answered(scoring._evaluated(*asked)[0]), answered(results))
    if task == "mmlu":
        subjects = [doc["subject"] for doc in suite.tasks[task].harness["test"].eval_docs]
        means = frame["prediction"].groupby(subjects).mean()
        assert {f"acc/{subject}": mean for subject, mean in means.items()}.items() <= values.items()
    assert len(frame) == 5 and further["harness"].endswith("1.0") and not further["warnings"]
    assert frame["prediction"].mean() == pytest.approx(values[TASKS[task][0]])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("routes", [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]], ids=["side by side", "merged"])
def test_each_prompt_is_answered_under_its_own_dense_merge(family, suite, bench, task, routes, monkeypatch):
    """A batch of different soft routes, or few routes that are merged, against a model merged for each prompt alone."""
    draws = torch.rand(5, len(TASKS), generator=torch.Generator().manual_seed(1)).softmax(-1)
    weights = draws[routes]
    monkeypatch.setattr(scoring, "applied", lambda *_: weights)
    monkeypatch.setattr("twinbench.workloads.generation.likelihood.SHARED", 8)  # all prompts begin alike
    monkeypatch.setattr("twinbench.routing.batch.SHARED", 10**9)  # more routes than experts are never merged
    assert merges_each(len(set(routes)), len(routes), len(TASKS)) == (len(set(routes)) < 5)
    got, made = answered(scoring._evaluated(bench, routed(), task, "test")[0]), merged(bench, twin(), False)[0]
    model = AutoModelForCausalLM.from_pretrained(family / "base")
    for row in range(5):
        model.load_state_dict(with_route(made, weights[row].tolist()), strict=False)
        alone = answered(by_hand(model, family, suite.tasks[task].harness["test"]))
        assert_answers_equal([got[row]], [alone[row]])


@pytest.mark.parametrize(
    "setting",
    [Setting(BASE, None), Setting(ARITHMETIC, None), Setting(INDIVIDUAL, "task"), routed()],
    ids=["base", "arithmetic", "individual", "twin"],
)
def test_experts_that_stay_factors_answer_as_dense_ones(family, suite, bench, setting):
    """Nothing is multiplied out: the base stays as it is, shared and exclusive parts run beside it."""
    slim = bench_of(opened(family, suite.tasks, factored=True))
    for task in ("truthful_qa", "cnn_dailymail"):
        wanted = answered(scoring._evaluated(bench, setting, task, "test")[0])
        got = answered(scoring._evaluated(slim, setting, task, "test")[0])
        assert_answers_equal(got, wanted)
    held = slim.module.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in suite.base.items()), "the base stays as it is"
    if setting.router:
        routes = [learned.weights(which, setting, "bbq", "test")[0] for which in (bench, slim)]
        assert torch.allclose(*routes, atol=1e-3)


def test_methods_that_are_not_linear_are_refused_where_experts_stay_factors(family, suite):
    slim = bench_of(opened(family, suite.tasks, factored=True))
    trimmed = Method("ties", "ties", partial(ties.merge, density=0.2, scaling=1.0, scope="global", aggregate="mean"))
    with pytest.raises(ValueError, match="this one is not: use suite"):
        merged(slim, trimmed, False)
    with pytest.raises(ValueError, match="compression must be svd, got 'magnitude'"):
        merged(slim, twin(compression="magnitude", rank_ratio=None, density=0.1), False)
    with pytest.raises(ValueError, match=r"masks has no factored form, which suite.factored=true needs"):
        merged(slim, Method("masks", "masks", individual.merge, route="task"), False)


@pytest.mark.parametrize("task", ["truthful_qa", "cnn_dailymail"])
def test_the_batch_size_does_not_change_a_score(suite, task):
    found = {}
    for size in (1, 3, 64):
        found[size] = answered(scoring._evaluated(bench_of(suite, size), Setting(BASE, None), task, "test")[0])
    for size in (1, 64):
        assert_answers_equal(found[size], found[3])


def test_a_prompt_that_is_too_long_loses_its_beginning_and_the_record_says_so(family):
    tasks = {name: load_task(family, name, max_length=100) for name in ("bbq", "cnn_dailymail")}
    tight = bench_of(opened(family, tasks))
    for task in tasks:
        said = scoring.score(tight, Setting(BASE, None), task, "test", None)[3]["warnings"]
        assert any("their beginning is left out" in warning for warning in said)


def test_where_memory_is_too_small_batches_shrink_and_the_record_says_so(suite):
    served, sizes = scoring._served(bench_of(suite, 8)), []

    def run(part: list[int]) -> list[int]:
        sizes.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [-item for item in part]

    with served.serving(Merged({}), None, 0.0), tqdm(disable=True) as bar:
        assert served._in_batches(list(range(9)), run, bar) == [-item for item in range(9)]
        assert sizes == [8, 4, 2, 2, 2, 2, 1] and served.warnings == [
            "GPU out of memory: batches of 4",
            "GPU out of memory: batches of 2",
        ]
        with pytest.raises(torch.OutOfMemoryError):
            served._in_batches([[1]], lambda part: run([0] * 4), bar)


def test_a_batch_holds_as_many_rows_as_its_size_and_at_least_one_item(suite):
    served, parts = scoring._served(bench_of(suite, 8)), []
    with served.serving(Merged({}), None, 0.0), tqdm(disable=True) as bar:
        served._in_batches([5, 3, 1, 9, 8, 1], lambda part: parts.append(part) or part, bar, rows=lambda item: item)
    assert parts == [[5, 3], [1], [9], [8], [1]]


def test_prompts_that_begin_alike_share_a_pass_over_their_beginning(suite, monkeypatch):
    """Against a pass over each prompt with each option, alone; prompts of two kinds of shots, and one of none."""
    own, read = bench_of(suite, 4), []
    served = scoring._served(own)
    served._max_length = 256
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, own.module.config.vocab_size, (count,), generator=draw).tolist()

    shots = [tokens(80), tokens(70), []]
    contexts = [shots[at % 3] + tokens(5 + at) for at in range(8)] + [shots[0]]
    options = [[tokens(2), tokens(4)], [[7, 9], [7, 8]]]
    requests = [(("", ""), context, option) for at, context in enumerate(contexts) for option in options[at % 2]]
    keep = own.module.register_forward_pre_hook(
        lambda _, given, named: read.append(named["input_ids"].numel()), with_kwargs=True
    )
    with served.serving(Merged({}), None, 0.0), own.answering(own.suite.base) as module:
        found = served._loglikelihood_tokens(requests)
        fewer = sum(read)
        read.clear()
        monkeypatch.setattr("twinbench.workloads.generation.likelihood.SHARED", 10**9)
        again = served._loglikelihood_tokens(requests)
        assert fewer < 0.7 * sum(read)
        keep.remove()
        for (_, context, option), one, other in zip(requests, found, again, strict=True):
            with torch.no_grad():
                logits = module(input_ids=torch.tensor([context + option])).logits[0, len(context) - 1 : -1]
            wanted = torch.tensor(option)
            alone = float(logits.log_softmax(-1).gather(1, wanted[:, None]).sum())
            assert one[0] == pytest.approx(alone, abs=1e-3) and other[0] == pytest.approx(alone, abs=1e-3)
            assert one[1] == other[1] == bool((logits.argmax(-1) == wanted).all())


def test_prompts_that_begin_alike_are_not_read_beside_one_that_does_not(suite):
    """In one batch they would be padded to its length, and read whole."""
    own, shapes = bench_of(suite, 8), []
    served = scoring._served(own)
    served._max_length = 256
    contexts = [[5] * 80 + [6 + at] * 5 for at in range(3)] + [[4] * 200]
    requests = [(("", ""), context, option) for context in contexts for option in ([7, 9], [7, 8])]
    keep = own.module.register_forward_pre_hook(
        lambda _, given, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    with served.serving(Merged({}), None, 0.0), own.answering(own.suite.base):
        served._loglikelihood_tokens(requests)
    keep.remove()
    assert shapes == [(1, 80), (3, 6), (1, 201)], "what they begin with, the rest of each, the long one"


def test_a_suite_on_a_cpu_attends_prompt_by_prompt(suite):
    assert module(suite, "cpu").config._attn_implementation == attention.PER_PROMPT


def test_a_prompt_that_is_too_long_is_read_from_its_end(suite):
    own = bench_of(suite, 4)
    served = scoring._served(own)
    served._max_length = 20
    context, options = list(range(3, 43)), [[5, 6], [7, 8, 9]]
    with served.serving(Merged({}), None, 0.0), own.answering(own.suite.base):
        cut = served._loglikelihood_tokens([(("", ""), context, option) for option in options])
        whole = served._loglikelihood_tokens([(("", ""), context[-17:], option) for option in options])
        assert cut == whole and len(served.warnings) == 1


def test_layers_that_see_a_window_share_no_beginning():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 64}
    for window, expected in ((None, True), (8, False)):
        model = MistralForCausalLM(MistralConfig(sliding_window=window, **sizes)).eval()
        assert attention.sees_all(model) == expected
        prompts = [tuple(range(3, 23 + at)) for at in range(3)]
        options, nobody = [(9, 8, 7), (9, 5)], lambda _: None
        together = likelihood.scored(model, prompts, [0] * 3, [options] * 3, nobody)
        for prompt, one in zip(prompts, together, strict=True):
            (other,) = likelihood.scored(model, [prompt], [0], [options], nobody)
            assert [score for score, _ in one] == pytest.approx([score for score, _ in other], abs=1e-4)


def test_options_that_are_read_to_their_end_are_counted_as_rows(suite):
    own, shapes = bench_of(suite, 8), []
    served = scoring._served(own)
    served._max_length = 64
    letters, sentences = [[4, 5], [4, 6]], [[4, 5, 6], [5, 6, 7], [6, 7], [7]]
    assert [likelihood.rows(options) for options in (letters, sentences, [[4]])] == [1, 3, 1]
    asked = [(("", ""), [at + 3] * 4, option) for at in range(6) for option in (sentences if at % 2 else letters)]
    keep = own.module.register_forward_pre_hook(
        lambda _, given, named: shapes.append(named["input_ids"].shape[0]), with_kwargs=True
    )
    with served.serving(Merged({}), None, 0.0), own.answering(own.suite.base):
        served._loglikelihood_tokens(asked)
    keep.remove()
    assert shapes == [4, 6, 2, 3], "letters, sentences, letters, sentences take 8 rows: of these the last pass has 6"


def test_letters_take_one_pass_over_whole_batches_of_prompts(suite):
    """lm-eval moves the white space before an answer into it, so that each letter is an option of two tokens."""
    own, shapes = bench_of(suite, 8), []
    keep = own.module.register_forward_pre_hook(
        lambda _, given, named: shapes.append(named["input_ids"].shape), with_kwargs=True
    )
    try:
        results = scoring._evaluated(own, Setting(BASE, None), "bbq", "test")[0]
    finally:
        keep.remove()
    (samples,) = results["samples"].values()
    assert sum(rows for rows, _ in shapes) == len(samples) and len(shapes) == -(-len(samples) // 8)


def test_under_bfloat16_the_head_computes_in_float32(suite):
    """Rounded to bfloat16, options of nearly one likelihood would tie, and the first of them would win."""
    found, seen = {}, {}
    for precision in ("float32", "bfloat16"):
        own = Workbench(suite, "cpu", 4, 2**30, precision)
        layer = own.module.base_model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda _, given, out, precision=precision: seen.update({precision: out.dtype}))
        with own.answering(suite.base) as module, torch.inference_mode():
            found[precision] = module(input_ids=torch.arange(4, 60)[None]).logits
    exact, low = found.values()
    assert seen == {"float32": torch.float32, "bfloat16": torch.bfloat16}
    assert low.dtype == torch.float32 and not torch.equal(low, low.bfloat16().float()) and not torch.equal(low, exact)
    torch.testing.assert_close(low, exact, rtol=0, atol=0.05 * exact.abs().max().item())


def test_the_command_line_of_lm_eval_gives_the_score_of_the_individual_model(family, tmp_path):
    """`lm_eval --model hf` on base and adapter, typed as in the README, over the whole test."""
    whole = load_task(family, "bbq", rows=dict.fromkeys(ROWS))
    alone = bench_of(opened(family, {"bbq": whole}))
    values, *_ = scoring.score(alone, Setting(INDIVIDUAL, "task"), "bbq", "test", None)
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", "twinbench_bbq"),
        *("--model_args", f"pretrained={family / 'base'},peft={family / 'experts' / 'bbq'},dtype=float32"),
        *("--include_path", str(language.TASKS), "--metadata", json.dumps({"folder": str(family / "data" / "bbq")})),
        *("--apply_chat_template", "--fewshot_as_multiturn", "--output_path", str(tmp_path)),
    ]
    subprocess.run(command, check=True, env=OS_ENVIRON, cwd=tmp_path, capture_output=True)
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["twinbench_bbq"]
    for metric in TASKS["bbq"]:
        assert values[metric] == pytest.approx(found[f"{metric},none"], abs=1e-6)


def test_the_router_reads_the_prompt_and_tells_the_tasks_apart(bench):
    hits = []
    for position, task in enumerate(TASKS):
        weights, seconds = learned.weights(bench, routed(epochs=40, lr=5e-3), task, "test")
        assert weights.shape == (5, 4) and seconds > 0
        hits.append(weights.argmax(1) == position)
    assert torch.cat(hits).float().mean() > 0.6  # of a random model's features, learned from 16 prompts


def test_a_router_may_read_what_a_prompt_is_about_and_nothing_of_its_format(family, bench):
    for frame in (load_task(family, name).splits["test"] for name in TASKS):
        assert all(text in prompt for text, prompt in zip(frame["content"], frame["prompt"], strict=True))
    bbq = load_task(family, "bbq").splits["test"]
    assert not bbq["content"].str.contains("Answer").any() and bbq["prompt"].str.contains("Answer").all()
    read = features.hidden_states(bench, "bbq", "test", layer=None, pool="content")
    spec = bench.suite.tasks["bbq"]
    alone = replace(spec, splits={"other": bbq[["content"]].rename(columns={"content": "prompt"})})
    suite = replace(bench.suite, tasks=dict(bench.suite.tasks) | {"bbq": alone})
    other = Workbench(suite, "cpu", 4, 10**9, "float32")
    other.module = bench.module
    torch.testing.assert_close(read, features.hidden_states(other, "bbq", "other", layer=None, pool="mean"))
    with pytest.raises(ValueError, match=r"router\.features\.pool=content: task bbq has no prompts that say"):
        features.hidden_states(other, "bbq", "other", layer=None, pool="content")


def test_the_best_answer_without_reading_is_a_letter_a_guess_or_nothing(family):
    bbq, truthful, cnn = (load_task(family, name).harness["test"] for name in ("bbq", "truthful_qa", "cnn_dailymail"))
    labels = [doc["label"] for doc in bbq.eval_docs]
    assert sum(scoring.constant(bbq, "acc")) == max(map(labels.count, labels))
    assert scoring.constant(truthful, "acc") == [1 / len(doc["mc1_targets"]["choices"]) for doc in truthful.eval_docs]
    assert scoring.constant(cnn, "rouge2") == [0.0] * len(cnn.eval_docs)
    for scored, metric in ((truthful, "mc2"), (cnn, "exact_match")):
        assert np.isnan(scoring.constant(scored, metric)).all(), "nobody knows"


@pytest.mark.parametrize(
    ("targets", "found"), [(["B", "A", "B"], [1, 0, 1]), ([0, 2, 2], [0, 1, 1]), ([[0], [1]], None)]
)
def test_a_target_is_an_option_or_its_place(targets, found):
    scored = SimpleNamespace(
        eval_docs=[{"target": target} for target in targets],
        OUTPUT_TYPE="multiple_choice",
        doc_to_choice=lambda doc: ["A", "B", "C"],
        doc_to_target=lambda doc: doc["target"],
    )
    given = scoring.constant(scored, "acc")
    assert given == found if found else np.isnan(given).all()


def test_splits_share_no_document_and_templates_stay_together(family):
    bbq = load_task(family, "bbq", rows=dict.fromkeys(ROWS))
    docs = {split: list(scored.eval_docs) for split, scored in bbq.harness.items()}
    templates = {split: {doc["question_index"] for doc in found} for split, found in docs.items()}
    assert sum(len(found) for found in docs.values()) == 160
    assert not templates["train"] & templates["test"] and not templates["validation"] & templates["test"]
    questions = load_task(family, "truthful_qa", rows=dict.fromkeys(ROWS)).splits
    assert len(set(pd.concat(questions.values())["prompt"])) == 60


def test_mmlu_shows_examples_of_the_questions_own_subject_in_the_test_and_none_in_training(family):
    mmlu = load_task(family, "mmlu", rows=dict.fromkeys(ROWS))
    shown = pd.read_parquet(family / "data" / "mmlu" / "dev.parquet").groupby("subject")["question"].apply(list)
    for doc, prompt in zip(mmlu.harness["test"].eval_docs, mmlu.splits["test"]["prompt"], strict=True):
        assert {shot["question"] for shot in doc["shots"]} == set(shown[doc["subject"]])
        assert prompt.count("Answer: ") == 2 and prompt.count("Answer:") == 3
        assert all(shot["question"].strip() in prompt for shot in doc["shots"])
    assert all(prompt.count("Answer:") == 1 for prompt in mmlu.splits["train"]["prompt"])


def test_answers_are_what_the_documents_call_right(family):
    for task, right in (
        ("mmlu", lambda doc: "ABCD"[doc["answer"]]),
        ("bbq", lambda doc: "ABC"[doc["label"]]),
        ("truthful_qa", lambda doc: doc["mc1_targets"]["choices"][0]),
        ("cnn_dailymail", lambda doc: doc["highlights"]),
    ):
        scored = load_task(family, task).harness["train"]
        assert language.answers(scored) == [right(doc) for doc in scored.eval_docs]


def test_scores_computed_by_hand(family):
    truthful = load_task(family, "truthful_qa").harness["test"]
    doc = next(iter(truthful.eval_docs))
    logs = np.log([0.2, 0.3, 0.1, 0.1, 0.3, 0.1, 0.5])  # mc1's three options, then mc2's four
    found = truthful.process_results(doc, [(value, False) for value in logs])
    assert found == pytest.approx({"acc": 0.0, "mc2": 0.4})
    bbq = load_task(family, "bbq", rows=dict.fromkeys(ROWS)).harness["test"]
    docs = [doc for doc in bbq.eval_docs if doc["context_condition"] == "ambig"][:4]
    leanings, rights = [], []
    for doc, given in zip(docs, (0, 0, 1, 2), strict=True):  # the old man, the old man, the woman, unknown
        results = [(0.0 if option == given else -1.0, False) for option in range(3)]
        scored = bbq.process_results(doc, results)["bias_ambig"]
        negative = doc["question_polarity"] == "neg"
        leanings.append({0: 1 if negative else -1, 1: -1 if negative else 1, 2: 0}[given])
        rights.append(float(given == doc["label"]))
        assert scored == (rights[-1], leanings[-1])
    bias = bbq.aggregation()["bias_ambig"](list(zip(rights, leanings, strict=True)))
    share = sum(side == 1 for side in leanings) / 3
    assert bias == pytest.approx((1 - np.mean(rights)) * (2 * share - 1))
    cnn = load_task(family, "cnn_dailymail").harness["test"]
    scored = cnn.process_results({"highlights": "the cat sat on the mat"}, ["the cat sat"])
    assert scored["rouge1"] == pytest.approx(2 * 1 * 0.5 / 1.5) and scored["empty"] == 0
    assert scored["rouge2"] == pytest.approx(2 * 1 * (2 / 5) / (1 + 2 / 5))
    assert cnn.process_results({"highlights": "the cat"}, ["  "]) == {
        **dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0.0),
        "empty": 1.0,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_eval": "twinbench_mmlux"}, "lm-eval has no task 'twinbench_mmlux'"),
        ({"metrics": ["f1"]}, "has the metrics acc, bias_ambig, bias_disambig; got \\['f1'\\]"),
        ({"rows": ROWS | {"test": 1000}}, "task bbq: test: rows must be in \\[1, "),
    ],
)
def test_mistakes_are_named(family, changes, message):
    with pytest.raises(ValueError, match=message):
        load_task(family, "bbq", **changes)


def test_any_lm_eval_task_file_can_be_named(family, tmp_path):
    """A YAML of a user's own, with a train split alone to learn from: what is held out comes from that."""
    rows = [{"text": f"{at} {sentence(np.random.default_rng(at), 2, 5)}", "label": at % 2} for at in range(40)]
    for split in ("train", "test"):
        pd.DataFrame(rows).to_parquet(tmp_path / f"{split}.parquet")
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    config = {
        "task": "mine",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{ text }}",
        "doc_to_choice": ["no", "yes"],
        "doc_to_target": "label",
        "should_decontaminate": True,  # by a template, as many of lm-eval's own do
        "doc_to_decontamination_query": "Question: {{ text }}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(config))
    task = load_task(family, "bbq", lm_eval=str(tmp_path / "mine.yaml"), metrics=["acc"])
    assert {split: len(found) for split, found in task.splits.items()} == ROWS
    assert not set(task.splits["train"]["prompt"]) & set(task.splits["validation"]["prompt"])
    assert list(task.splits["test"]) == ["prompt"], "a template may hold the format of the task"


def test_of_a_task_that_reads_answers_in_several_ways_the_first_counts(family, tmp_path):
    rows = [{"text": f"{at} {sentence(np.random.default_rng(at), 2, 5)}", "label": "a"} for at in range(40)]
    pd.DataFrame(rows).to_parquet(tmp_path / "all.parquet")
    reads = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "flexible")]
    config = {
        "task": "twice",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {split: str(tmp_path / "all.parquet") for split in ("train", "test")}},
        **{"training_split": "train", "test_split": "test", "output_type": "generate_until"},
        **{"doc_to_text": "{{ text }}", "doc_to_target": "{{ label }}", "filter_list": reads},
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "twice.yaml").write_text(json.dumps(config))
    task = load_task(family, "bbq", lm_eval=str(tmp_path / "twice.yaml"), metrics=["exact_match"])
    alone = bench_of(opened(family, {"bbq": task}))
    values, frame, *_ = scoring.score(alone, Setting(BASE, None), "bbq", "test", None)
    assert set(values) == {"exact_match"} and len(frame) == ROWS["test"]


# ---- training


def recipe(**changes) -> instruct.Recipe:
    given = {"epochs": 2, "tokens": 400, "batch_size": 2, "lr": 5e-3, "weight_decay": 0.0, "warmup": 0.1, "rank": 4}
    return instruct.Recipe(**given | {"alpha": 8, "dropout": 0.0, "targets": ("q_proj", "v_proj"), "seed": 0} | changes)


@pytest.mark.parametrize("kind", ["sdpa", attention.PER_EXAMPLE])
def test_packed_examples_have_the_losses_that_they_have_alone(family, kind):
    task, tokens = load_task(family, "bbq"), open_tokenizer(family / "base")
    examples = instruct.encoded(task, "train", tokens, 1000)
    rows = instruct.packed(examples, 1000, 0)
    assert max(row["position_ids"].count(0) for row in rows) > 1 and len(rows) < len(examples)
    model, plain = (instruct.open_base(family / "base").eval() for _ in range(2))
    if kind == attention.PER_EXAMPLE:
        attention.attend_per_example(model)
    assert (model.config._attn_implementation, plain.config._attn_implementation) == (kind, "sdpa")

    def losses(ids: list[int], labels: list[int]) -> torch.Tensor:
        logits, wanted = plain(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:])
        return torch.nn.functional.cross_entropy(logits, wanted, reduction="none")[wanted != -100]

    with torch.inference_mode():
        batch = instruct._batch(rows)
        found = model(**batch)
        together = torch.nn.functional.cross_entropy(found.logits[0], batch["labels"][0], reduction="none")
        alone = torch.cat([losses(*example) for example in examples])
    assert torch.allclose(together.sort().values, alone.sort().values, atol=1e-4)
    assert found.loss == pytest.approx(float(alone.mean()), abs=1e-4)
    assert len(alone) == sum(len(answer) + 1 for answer in language.answers(task.harness["train"])), "answers and ends"


def test_an_adapter_is_trained_on_answers_alone_once_and_reproducibly(family, tmp_path):
    task, base = load_task(family, "mmlu"), family / "base"

    def trained(folder: Path) -> Path:
        return instruct.finetune(base, task, recipe(), folder, "cpu", base)

    first, second = (trained(tmp_path / name) for name in "ab")
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in (first, second)]
    assert files[0] == files[1]
    history = json.loads((first / "training.json").read_text())
    losses = [entry["eval_loss"] for entry in history["curve"] if "eval_loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    stamp = (first / "adapter_model.safetensors").stat().st_mtime_ns
    trained(first)
    assert (first / "adapter_model.safetensors").stat().st_mtime_ns == stamp, "cached"
    assert module(opened(family, {"mmlu": task}, mmlu=first), "cpu")


@pytest.mark.parametrize(("change", "message"), [({"rank": 0}, "rank must be at least 1"), ({"lr": 0}, "lr must be")])
def test_recipes_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        recipe(**change)


# ---- the whole


LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")  # which torchrun is


def run_whole(family: Path, folder: Path, results: str, *given: str, **settings) -> subprocess.CompletedProcess:
    """The command that a user types; experts are in the folder's cache."""
    rows = "{train: 10, validation: 6, test: 5}"
    return command(
        "-m",
        "suite=generative_smollm",
        f"+suite.base.path={family / 'base'}",
        *(f"suite.tasks.{task}.rows={rows}" for task in TASKS),
        "suite.finetune.rank=4",
        "suite.finetune.bf16=false",  # any machine can
        "router.model.epochs=5",
        "batch_size=4",
        "wandb.mode=disabled",
        f"results_dir={folder / results}",
        *given,
        TWINBENCH_DATA=str(family / "data"),
        TWINBENCH_CACHE=str(folder / "cache"),
        OMP_NUM_THREADS="1",  # experts are the same to the last bit every time
        **settings,
    )


def recorded(results: Path) -> list[dict]:
    files = sorted((results / "records").iterdir())
    return [json.loads(line) for file in files for line in file.open(encoding="utf-8")]


@pytest.fixture(scope="module")
def whole(family, tmp_path_factory) -> Path:
    """A folder with the results of two methods, and a cache with the experts."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_whole(family, folder, "results", "method=individual,twin_merging")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 ok" in done.stdout
    return folder


def test_a_generative_suite_runs_whole(whole):
    """Experts are trained, methods scored and reported by the command that a user types."""
    (folder,) = (whole / "results" / "reports").iterdir()
    assert "token_accuracy" in (folder / "index.html").read_text()
    others = pd.read_csv(folder / "strict_secondary.csv")["metric"].tolist()
    assert {"bias_ambig", "mc2", "rougeL", "acc/law", "acc/physics"} <= set(others)
    rows = recorded(whole / "results")
    assert {row["task"] for row in rows} == set(TASKS) and all(row["status"] == "ok" for row in rows)
    assert all(row["harness"].startswith("lm-eval") for row in rows)
    assert {row["subset"] for row in rows if row["task"] == "mmlu"} == {"5 of 20 documents, drawn by seed 0"}
    routed = [row for row in rows if row["method"] == "twin_merging" and row["metric"] == "router_accuracy"]
    assert len(routed) == 4
    adapters = [file.stat().st_size for file in (whole / "cache" / "experts").glob("*/adapter_model.safetensors")]
    assert len(adapters) == 4
    stored = {(row["exclusive_bytes"], row["exclusive_kind"]) for row in rows if row["method"] == "individual"}
    assert stored == {(sum(adapters), "LoRA adapters")}


def test_two_processes_share_the_prompts_and_give_the_records_of_one(family, whole):
    done = run_whole(family, whole, "shared", "method=individual,twin_merging", launcher=LAUNCHER)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("2 ok") == 1, "the first process speaks alone"
    alone, shared = recorded(whole / "results"), recorded(whole / "shared")
    assert all(row["device"].startswith("2 processes") for row in shared)
    named = [(row["run_id"], row["task"], row["metric"], row["n"]) for row in alone]
    assert named == [(row["run_id"], row["task"], row["metric"], row["n"]) for row in shared]
    for run_id in {row["run_id"] for row in alone}:
        one, two = (store.predictions(whole / results, run_id) for results in ("results", "shared"))
        columns = ["task", "row", "prompt_hash"]
        pd.testing.assert_frame_equal(one[columns], two[columns])
        same = np.isclose(one["prediction"], two["prediction"]) & (one["route"].isna() | (one["route"] == two["route"]))
        assert same.mean() >= 0.9, "batches of other sizes may turn a near tie of this small model"
        for row in shared:
            if row["run_id"] == run_id and row["primary"]:
                assert row["value"] == pytest.approx(two[two["task"] == row["task"]]["prediction"].mean())
    again = run_whole(family, whole, "shared", "method=individual", launcher=LAUNCHER)
    assert again.returncode == 0 and "1 skipped" in again.stdout, again.stderr[-2000:]


def test_several_processes_do_not_train_the_experts(family, whole):
    done = run_whole(family, whole, "none", "method=individual", "suite.finetune.seed=1", launcher=LAUNCHER)
    assert done.returncode != 0
    assert "start it once without the launcher" in done.stderr
