"""The protocols: what is merged, and who knows which task a text belongs to.

A protocol is part of a result's identity; results of different protocols are never ranked together. To add one, add an
entry to `PROTOCOLS` (and its name to the comment in ``conf/config.yaml``).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """What is merged, and who is told the task.

    Attributes:
        sentence: what a report says of it.
        gold_biases: every task keeps its own expert's biases; else they are merged as all other weights.
        knows_task: the method and the head are told the task; else the router has to find both.
    """

    name: str
    sentence: str
    gold_biases: bool
    knows_task: bool

    @property
    def needs_expert(self) -> bool:
        """Whether it can only score tasks whose expert is merged: the router picks it, or its biases are used."""
        return self.gold_biases or not self.knows_task


STRICT = Protocol(
    "strict",
    "Everything but the task's head is merged; the head is the gold task's.",
    gold_biases=False,
    knows_task=True,
)
PAPER = Protocol(
    "paper",
    "As the official Twin-Merging code: biases and heads stay the gold task's own.",
    gold_biases=True,
    knows_task=True,
)
BLIND = Protocol(
    "blind",
    "No task id anywhere: the router also picks the head. A row sent to another task's head is wrong; "
    "in a regression it counts as the mean training label.",
    gold_biases=False,
    knows_task=False,
)
PROTOCOLS = {protocol.name: protocol for protocol in (STRICT, PAPER, BLIND)}  # in a report's order
NORMALIZER = STRICT.name  # scores are divided by those of the upper bound under this protocol
