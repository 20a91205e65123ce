"""What a method, a router, a recipe or a loader takes, read from its source: an import would load torch."""

import ast
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from twinbench.system import source
from twinbench.system.mistakes import Mistake, one_of

FOLDER = source.located("twinbench.prepared").parent  # one file per argument that a method may ask the run for
READS = ("nothing", "training inputs", "training labels", "test inputs")  # what such a file reads, the least first
NAMED = frozenset(file.stem for file in FOLDER.glob("[a-z]*.py"))
PREPARED = {"base", "experts", "shared", "seed", *NAMED}  # arguments that the run makes; the others are the YAML's


@dataclass(frozen=True)
class Signature:
    """A function or a dataclass, and constants of its module.

    Attributes:
        arguments: a function's keyword-only ones; a dataclass's fields.
        defaults: of those arguments whose default is a literal.
        route: ``ROUTE``: how a method finds w(x): None, "task", "router" or "layer".
        draws: ``DRAWS``: per hyperparameter the values under which a method or a router's model draws random numbers;
            None: under all; empty: under none, as of a function without an argument ``seed``.
        role: ``ROLE``: "upper bound", "lower bound" or "one expert" for a method that is no rival; None for the others.
        reads: the data that a method's prepared arguments read, one of `READS`.
        scored: ``SCORED``: the arguments of a task's loader that say what is scored, and train nothing.
    """

    arguments: frozenset[str]
    defaults: Mapping[str, object]
    route: str | None
    draws: Mapping[str, Collection] | None
    role: str | None
    reads: str
    scored: frozenset[str]


def signature(target: str) -> Signature:
    """Read the signature of ``MODULE.NAME``.

    Raises:
        ValueError: there is no such module, function or class, or ``DRAWS`` names no argument of it.
    """
    own, module = source.definition(target), target.rpartition(".")[0]
    arguments = dict(_parameters(own.args) if isinstance(own, ast.FunctionDef) else _fields(own))
    constants = _constants(source.located(module), {"ROUTE": None, "DRAWS": None, "ROLE": None, "SCORED": ()})
    for key in constants["DRAWS"] or ():
        one_of(f"hyperparameter in DRAWS of {module}", key, arguments)
    needs = most_read(prepared_reads(name) for name in arguments.keys() & NAMED)
    drawn = constants["DRAWS"] if "seed" in arguments or isinstance(own, ast.ClassDef) else {}
    route, role = constants["ROUTE"], constants["ROLE"]
    scored = frozenset(constants["SCORED"])
    return Signature(frozenset(arguments), _literals(arguments), route, drawn, role, needs, scored)


def prepared_reads(argument: str) -> str:
    """What data a prepared argument reads: ``READS`` of its file."""
    return _constants(FOLDER / f"{argument}.py", {"READS": None})["READS"]


def prepared_needs(argument: str) -> tuple[str, ...]:
    """The functions of the suite's workload that measure a prepared argument: ``NEEDS`` of its file, or none."""
    return _constants(FOLDER / f"{argument}.py", {"NEEDS": ()})["NEEDS"]


def prepared_by_class(argument: str) -> bool:
    """Whether a prepared argument goes by the probabilities of classes, which a regression lacks: ``BY_CLASS``."""
    return _constants(FOLDER / f"{argument}.py", {"BY_CLASS": False})["BY_CLASS"]


def offered(workload: str) -> Collection[str]:
    """The functions that a workload has: ``__all__`` of its module."""
    return _constants(source.located(f"twinbench.workloads.{workload}.workload"), {"__all__": ()})["__all__"]


def most_read(needs: Iterable[str]) -> str:
    """Of several `READS` the one that asks for most; "nothing" of none."""
    return max(needs, key=READS.index, default="nothing")


def router_reads(settings: Mapping, *, learns: bool = True) -> str:
    """What data a router reads: groups are made of the scored rows, and what a route costs, of labels."""
    if settings.get("groups"):
        return "test inputs"
    if settings.get("minimum_risk"):
        return "training labels"
    return "training inputs" if learns else "nothing"


def learns(target: str) -> bool:
    """Whether a router's model learns from rows: all do, but a class that has a ``ready`` in the place of ``fit``."""
    own = (node.name for node in source.definition(target).body if isinstance(node, ast.FunctionDef))
    return "ready" not in own


def draws(takes: Signature, values: Mapping) -> bool:
    """Whether a method or a router's model draws random numbers under these values: then a seed changes its result."""
    return takes.draws is None or any(values[key] in drawn for key, drawn in takes.draws.items())


def hyperparameters(leaf: Mapping) -> dict:
    """The values of a config leaf without Hydra's own keys."""
    return {key: value for key, value in leaf.items() if not key.startswith("_")}


def completed(leaf: Mapping) -> dict:
    """The values of a config leaf, with the defaults of what it leaves out."""
    return dict(signature(leaf["_target_"]).defaults) | hyperparameters(leaf)


def checked_signature(name: str, leaf: Mapping) -> Signature:
    """The signature of a method's config leaf.

    Raises:
        ValueError: the leaf has a hyperparameter too many or too few.
    """
    found = signature(leaf["_target_"])
    given, wanted = set(hyperparameters(leaf)), found.arguments - PREPARED
    for key in sorted(given - wanted):
        one_of(f"hyperparameter of {name}", key, sorted(wanted))
    if wanted - given:
        raise Mistake(f"{name} lacks {', '.join(sorted(wanted - given))}; it takes {', '.join(sorted(wanted))}")
    return found


def _constants(file: Path, wanted: Mapping[str, object]) -> dict:
    """The literals that a module assigns to these names, or what stands there for them."""
    found = dict(wanted)
    for node in source.parsed(file).body:
        if isinstance(node, ast.Assign) and (known := ast.unparse(node.targets[0])) in found:
            found[known] = ast.literal_eval(node.value)
    return found


def _parameters(given: ast.arguments) -> Iterator[tuple[str, ast.expr | None]]:
    """A function's keyword-only arguments with their defaults."""
    return ((argument.arg, default) for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True))


def _fields(given: ast.ClassDef) -> Iterator[tuple[str, ast.expr | None]]:
    """A dataclass's fields with their defaults."""
    return ((node.target.id, node.value) for node in given.body if isinstance(node, ast.AnnAssign))


def _literals(given: Mapping[str, ast.expr | None]) -> dict:
    """The values of those defaults that are literals; of others a plan knows nothing."""
    found = {}
    for name, default in given.items():
        if default is not None:
            with suppress(ValueError):
                found[name] = ast.literal_eval(default)
    return found
