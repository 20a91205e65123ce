"""What a method takes, read from its source: an import would load torch, which a plan need not pay."""

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from twinbench.mistakes import one_of

PREPARED = {"base", "experts", "shared", "seed", "basis"}  # arguments that the run makes; the others are the YAML's


@dataclass(frozen=True)
class Signature:
    """Arguments and route of a method, read from its source."""

    arguments: frozenset[str]
    route: str | None


def signature(target: str) -> Signature:
    """Read a method's keyword-only arguments and its module's ``ROUTE`` from the source; an import would load torch."""
    module, _, function = target.rpartition(".")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"_target_={target}: there is no module {module}")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    route, arguments = None, None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            arguments = frozenset(argument.arg for argument in node.args.kwonlyargs)
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["ROUTE"]:
            route = ast.literal_eval(node.value)
    if arguments is None:
        raise ValueError(f"_target_={target}: {spec.origin} has no function {function}")
    return Signature(arguments, route)


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
        raise ValueError(f"{name} lacks {', '.join(sorted(wanted - given))}; it takes {', '.join(sorted(wanted))}")
    return found


def hyperparameters(leaf: Mapping) -> dict:
    """The values of a config leaf without Hydra's own keys."""
    return {key: value for key, value in leaf.items() if not key.startswith("_")}
