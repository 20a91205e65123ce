"""Texts with typing errors: how much of a score, and of a route, hangs on clean inputs."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # rows of a keyboard: a neighbour is struck in a letter's place


def mistyped(frame: pd.DataFrame, columns: Sequence[str], rate: float) -> pd.DataFrame:
    """The frame with typing errors in its text columns.

    Each letter is struck wrong with probability ``rate`` in (0, 1]: left out, doubled, swapped with the one before it,
    or replaced by a neighbour on the keyboard, each as likely as the other. The same text always has the same errors.
    """
    return frame.assign(**{column: [_typed(text, rate) for text in frame[column]] for column in columns})


def _typed(text: str, rate: float) -> str:
    draw = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]))
    wrong, kinds, picks = draw.random(len(text)) < rate, draw.integers(4, size=len(text)), draw.random(len(text))
    typed: list[str] = []
    for letter, slip, kind, pick in zip(text, wrong, kinds, picks, strict=True):
        if not slip or not letter.isalpha():
            typed.append(letter)
        elif kind == 1:
            typed += [letter, letter]
        elif kind == 2:
            typed.insert(max(len(typed) - 1, 0), letter)
        elif kind == 3:
            typed.append(_neighbour(letter, pick))
    return "".join(typed)


def _neighbour(letter: str, pick: float) -> str:
    for row in KEYS:
        place = row.find(letter.lower())
        if place >= 0:
            beside = row[max(place - 1, 0) : place] + row[place + 1 : place + 2]
            found = beside[int(pick * len(beside))]
            return found.upper() if letter.isupper() else found
    return letter
