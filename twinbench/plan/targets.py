"""What a configuration may name by ``_target_``, and the values that this takes; read from its source, never imported.

A suite file from somebody else is data: the functions that it names are twinbench's own, or of packages that the user
lists in ``allow``.
"""

import ast
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from twinbench.system import source
from twinbench.system.mistakes import Mistake, one_of

OWN = ("method", "shared", "router.model", "data")  # what a configuration makes; data is a task's
MODULES = {"data": ("twinbench.tasks",), "model": ("twinbench",)}
METHODS = ("baselines", "twinbench")
LARGEST = 3.4e38  # of a float32
WANTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a finite number (float32)",
    "str": "a name",
    "None": "null",
    "list[str]": "a list of names, [A, B]",
    "mapping": "keys with values, {KEY: VALUE}",
}


@dataclass(frozen=True)
class Argument:
    """An argument of a function or a field of a dataclass: its annotation and whether it must be given."""

    kind: str
    required: bool


def check(config: Mapping, allow: Sequence[str]) -> None:
    """Find what a resolved configuration names by ``_target_`` and may not.

    Args:
        allow: packages of the user's own.

    Raises:
        ValueError: the first one that is elsewhere than in twinbench, baselines and ``allow``, that is not the place
            of one, or that has Hydra's keys beside it that change what is called.
    """
    for place, leaf in _leaves(config, ""):
        target, role = leaf["_target_"], place.rpartition(".")[2]
        modules = (*MODULES.get(role, METHODS), *allow)
        if not isinstance(target, str) or not target.startswith(tuple(f"{module}." for module in modules)):
            raise Mistake(
                f"{place}._target_={target}: only functions in {' and '.join(modules)} may be named there; for a "
                "package of your own add allow=[PACKAGE]"
            )
        if place not in OWN[:3] and not (place.startswith("suite.tasks.") and role == "data"):
            raise Mistake(f"{place}._target_={target}: nothing is made there, only of {', '.join(OWN)}")
        strange = [key for key in leaf if key.startswith("_") and key not in ("_target_", "_partial_")]
        if strange:
            raise Mistake(f"{place}.{strange[0]}: beside _target_ only _partial_ has a meaning")
        later = role != "model"
        if leaf.get("_partial_", False) is not later:
            words = "it is called later, with more arguments" if later else "it is made as it stands"
            raise Mistake(f"{place}._partial_ must be {str(later).lower()} beside _target_={target}: {words}")
        arguments(target)


def _leaves(node: object, place: str) -> Iterator[tuple[str, Mapping]]:
    """Every mapping with a ``_target_``, under its key."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield place, node
        for key, value in node.items():
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from _leaves(value, f"{place}.{position}")


@functools.cache
def arguments(target: str) -> Mapping[str, Argument]:
    """The arguments of a function, or the fields of a dataclass, by name.

    Raises:
        ValueError: there is no such module, or it does not define that name itself.
    """
    node = source.definition(target)
    if isinstance(node, ast.ClassDef):
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        return {field.target.id: Argument(_kind(field.annotation), field.value is None) for field in fields}
    plain, lacking = node.args.args, len(node.args.args) - len(node.args.defaults)
    defaults = [*[None] * lacking, *node.args.defaults, *node.args.kw_defaults]
    given = zip([*plain, *node.args.kwonlyargs], defaults, strict=True)
    return {arg.arg: Argument(_kind(arg.annotation), default is None) for arg, default in given}


def check_values(place: str, values: Mapping[str, object], known: Mapping[str, Argument]) -> None:
    """Compare values with the arguments that take them.

    Raises:
        ValueError: an unknown key (with the nearest), one that lacks, or a value of the wrong kind.
    """
    for key in values:
        one_of(f"key of {place}", key, known)
    check_kinds(place, values, known)
    for key, argument in known.items():
        if key not in values and argument.required:
            raise Mistake(f"{place} lacks {key}, {wanted(argument.kind)}; its keys are {', '.join(known)}")


def check_kinds(place: str, values: Mapping[str, object], known: Mapping[str, Argument]) -> None:
    """Raise ValueError unless each value is of its argument's kind."""
    for key, value in values.items():
        check_kind(f"{place}.{key}", value, known[key].kind)


def check_kind(key: str, value: object, kind: str) -> None:
    """Raise ValueError unless a value is of a kind, such as ``float | None``; kinds that are not known pass."""
    kinds = kind.split(" | ")
    if set(kinds) <= WANTED.keys() and not any(_is(value, kind) for kind in kinds):
        raise Mistake(f"{key} must be {wanted(kind)}, got {value!r}")


def wanted(kind: str) -> str:
    """A kind in words."""
    return " or ".join(WANTED.get(word, word) for word in kind.split(" | "))


def _is(value: object, kind: str) -> bool:
    if kind in ("None", "mapping"):
        return value is None if kind == "None" else isinstance(value, Mapping)
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == "float":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value) and abs(value) <= LARGEST
    return type(value).__name__ == kind


def _kind(annotation: ast.expr | None) -> str:
    """An annotation as it is written; a tuple of names is a list in a configuration."""
    text = ast.unparse(annotation) if annotation else ""
    return text.replace("tuple[str, ...]", "list[str]").replace("Sequence[str]", "list[str]")
