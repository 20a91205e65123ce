"""One-line mutations of Python source: what `tests/mutants.py` draws from.

Not mutated, since no behaviour hangs on it: docstrings, messages of errors, f-strings, type hints, decorators,
`__repr__`, what is printed, labels of progress bars, sizes of caches, and two guards (`zip(strict=True)`, `encoding=`).
An argument that is left out is a keyword or the last of several: a call without the others just fails.
"""

import ast
import copy
from collections.abc import Iterator
from typing import NamedTuple

SWAPPED = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr},
}
RENAMED = {"min": "max", "max": "min", "any": "all", "all": "any"}
QUIET = {"strict", "encoding", "desc", "unit", "unit_scale", "leave", "disable", "progress", "maxsize", "indent"}
SAID = {"print", "warn", "warning", "info", "bar.update"}
ATOMS = ast.Constant | ast.Call | ast.Compare | ast.Subscript | ast.Name | ast.Dict  # need no parentheses


class Place(NamedTuple):
    """A node of a file's tree, and one that may stand there instead.

    Attributes:
        statement: first and last line of the statement around it, of its header alone where it has a body.
        function: first and last line of the innermost function around it, or None outside of all.
    """

    kind: str
    node: ast.AST
    other: ast.AST
    statement: tuple[int, int]
    function: tuple[int, int] | None


def places(source: str) -> list[Place]:
    """All mutations of a file."""
    return list(_places(ast.parse(source), (1, 1), None))


def mutated(source: str, place: Place) -> tuple[str, str, str] | None:
    """The file's text after a mutation, and the line (or the expression of several lines) before and after it.

    None where that does not compile or says the same.
    """
    node, text = place.node, ast.unparse(ast.fix_missing_locations(place.other))
    if isinstance(place.other, ast.expr) and not isinstance(place.other, ATOMS):
        text = f"({text})"
    lines = source.splitlines(keepends=True)
    first, last = lines[node.lineno - 1].encode(), lines[node.end_lineno - 1].encode()
    line = first[: node.col_offset].decode() + text + last[node.end_col_offset :].decode()
    changed = "".join([*lines[: node.lineno - 1], line, *lines[node.end_lineno :]])
    try:
        compile(changed, "mutant", "exec", dont_inherit=True)
        if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
            return None
    except (SyntaxError, ValueError):
        return None
    if node.lineno == node.end_lineno:
        return changed, lines[node.lineno - 1].strip(), line.strip()
    return changed, ast.unparse(node), text


def _places(node: ast.AST, statement: tuple[int, int], function: tuple[int, int] | None) -> Iterator[Place]:
    if isinstance(node, ast.stmt):
        body = getattr(node, "body", None)
        statement = (node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno)
    if isinstance(node, ast.FunctionDef):
        function = (node.lineno, node.end_lineno)
    for kind, other in _others(node):
        yield Place(kind, node.test if kind == "condition" else node, other, statement, function)
    for name, value in ast.iter_fields(node) if not isinstance(node, ast.Raise) else ():
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in ("annotation", "returns", "decorator_list", "msg"):
                yield from [] if _idle(child) else _places(child, statement, function)


def _idle(node: ast.AST) -> bool:
    """Whether no behaviour hangs on a node: a docstring, a text, a label, something printed."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return bool({ast.unparse(node.value.func), getattr(node.value.func, "attr", "")} & SAID)
    if isinstance(node, ast.FunctionDef):
        return node.name == "__repr__"
    if isinstance(node, ast.keyword):
        return node.arg in QUIET
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _others(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in place of a node, with the kind of the mutation."""
    match node:
        case ast.Compare():
            for i, operator in enumerate(node.ops):
                yield "comparison", _with(node, ops=_put(node.ops, i, SWAPPED[type(operator)]()))
            yield from (("key", _with(node, comparators=[key])) for key in _keys(node.comparators[-1]))
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if type(node.op) in SWAPPED:
            yield "operator", _with(node, op=SWAPPED[type(node.op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "sign", node.operand
        case ast.Constant(value=bool()):
            yield "constant", ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield from (
                ("constant", ast.Constant(n)) for n in sorted({node.value + 1, node.value - 1, 0} - {node.value})
            )
        case ast.Constant(value=float()):
            yield "constant", ast.Constant(2 * node.value if node.value else 1.0)
        case ast.Subscript():
            yield from (("key", _with(node, slice=key)) for key in _keys(node.slice))
        case ast.Dict():
            keys = ((i, key) for i, old in enumerate(node.keys) for key in _keys(old))
            yield from (("key", _with(node, keys=_put(node.keys, i, key))) for i, key in keys)
        case ast.Slice():
            yield from (("slice", _with(node, **{end: None})) for end in ("lower", "upper") if getattr(node, end))
        case ast.Call():
            yield from _calls(node)
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield "left out", ast.Return(None)
        case ast.Raise() | ast.AugAssign() | ast.Continue() | ast.Break() | ast.Expr(value=ast.Call()):
            yield "left out", ast.Pass()
        case ast.Assign() if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            yield "left out", ast.Pass()
        case ast.If() | ast.While() | ast.IfExp() if not isinstance(node.test, ast.Compare | ast.UnaryOp):
            if getattr(node.test, "id", "") != "TYPE_CHECKING":
                yield "condition", ast.UnaryOp(ast.Not(), node.test)


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.Call]]:
    if getattr(node.func, "id", "") in RENAMED:
        yield "function", _with(node, func=ast.Name(RENAMED[node.func.id]))
    for i, keyword in enumerate(node.keywords):
        if keyword.arg and keyword.arg not in QUIET:
            yield "argument", _with(node, keywords=_put(node.keywords, i))
    if len(node.args) > 1:
        yield "argument", _with(node, args=node.args[:-1])
    if len(node.args) > 1 and getattr(node.func, "id", "") not in RENAMED:
        yield "swap", _with(node, args=[node.args[1], node.args[0], *node.args[2:]])


def _keys(node: ast.AST | None) -> Iterator[ast.Constant]:
    """Another key where a node is one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield ast.Constant(node.value + "_")


def _put(items: list, position: int, *others) -> list:
    return [*items[:position], *others, *items[position + 1 :]]


def _with(node: ast.AST, **changes) -> ast.AST:
    changed = copy.copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed
