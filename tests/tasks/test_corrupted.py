"""Texts that are struck wrong: as often as asked, always in the same way, and only where a method is scored."""

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from support.commands import composed, planned
from twinbench import prepare
from twinbench.plan.identity import expert_id
from twinbench.tasks.corrupted import mistyped

TEXTS = ["The quick brown fox jumps over the lazy dog, 17 times.", "Zug um Zug!", "", "12 34", "ÄÖÜ und ß"]


def distance(left: str, right: str) -> int:
    """Levenshtein's: how many letters are put in, left out or replaced."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def typed(texts: list[str], rate: float) -> list[str]:
    return mistyped(pd.DataFrame({"text": texts, "label": 0}), ["text"], rate)["text"].tolist()


def test_the_same_text_has_the_same_errors_and_only_letters_have_any():
    first, again = typed(TEXTS, 0.5), typed(TEXTS[::-1], 0.5)[::-1]
    assert first == again and first[0] != TEXTS[0]
    assert dict(zip(TEXTS, first, strict=True))[""] == "" and first[TEXTS.index("12 34")] == "12 34"


def test_as_many_letters_are_wrong_as_asked():
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("etaoinshrdlu"), size=200)) for _ in range(50)]
    for rate in (0.05, 0.2):
        found = typed(texts, rate)
        wrong = sum(distance(a, b) for a, b in zip(texts, found, strict=True)) / (200 * len(texts))
        # a letter that is swapped with another is two replacements, and with the same one none
        assert 0.8 * rate < wrong < 1.4 * rate, (rate, wrong)


def test_a_mistyped_suite_is_another_suite_of_the_same_experts():
    clean, rate = planned("suite=demo"), "suite.corrupted=0.1"
    wrong = planned("suite=demo", rate)
    assert clean.suite_id != wrong.suite_id != planned("suite=demo", "suite.corrupted=0.2").suite_id
    assert all(expert_id(clean.config["suite"], t) == expert_id(wrong.config["suite"], t) for t in ("sst2", "trec"))
    assert wrong.config["suite"]["corrupted"] == 0.1


def test_a_suite_reads_its_rows_mistyped(family, tmp_path):
    read = {}
    for rate in ("null", "0.5"):
        suite = OmegaConf.to_container(composed(family / "conf", tmp_path, f"suite.corrupted={rate}"), resolve=True)
        read[rate] = prepare.read(suite["suite"])["letters"].splits
    assert read["null"]["train"].equals(read["0.5"]["train"])
    assert read["null"]["validation"].equals(read["0.5"]["validation"])
    clean, wrong = (read[rate]["test"] for rate in ("null", "0.5"))
    assert (clean["text"] != wrong["text"]).mean() > 0.5 and (clean["label"] == wrong["label"]).all()
