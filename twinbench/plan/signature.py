"""What a method, a router, a recipe or a loader takes, read from its source: an import would load torch."""

import ast
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from twinbench.system import source
from twinbench.system.mistakes import Mistake, one_of

PREPARED = {"base", "experts", "shared", "seed", "basis"}  # arguments that the run makes; the others are the YAML's


@dataclass(frozen=True)
class Signature:
    """A function or a dataclass, and two constants of its module.

    Attributes:
        arguments: a function's keyword-only ones; a dataclass's fields.
        defaults: of those arguments whose default is a literal.
        route: ``ROUTE``: how a method finds w(x).
        draws: ``DRAWS``: per hyperparameter the values under which a method draws random numbers; None: under all.
    """

    arguments: frozenset[str]
    defaults: Mapping[str, object]
    route: str | None
    draws: Mapping[str, Collection] | None


def signature(target: str) -> Signature:
    """Read the signature of ``MODULE.NAME``.

    Raises:
        ValueError: there is no such module, function or class, or ``DRAWS`` names no argument of it.
    """
    own, module = source.definition(target), target.rpartition(".")[0]
    arguments = dict(_parameters(own.args) if isinstance(own, ast.FunctionDef) else _fields(own))
    constants = {"ROUTE": None, "DRAWS": None}
    for node in source.parsed(source.located(module)).body:
        if isinstance(node, ast.Assign) and (known := ast.unparse(node.targets[0])) in constants:
            constants[known] = ast.literal_eval(node.value)
    for key in constants["DRAWS"] or ():
        one_of(f"hyperparameter in DRAWS of {module}", key, arguments)
    return Signature(frozenset(arguments), _literals(arguments), constants["ROUTE"], constants["DRAWS"])


def draws(takes: Signature, values: Mapping) -> bool:
    """Whether a method draws random numbers under these hyperparameters, so that its seed changes its result."""
    if "seed" not in takes.arguments:
        return False
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
