"""What code does, as a hash of its source: a method whose source has changed is another method.

Docstrings, comments, formatting and import lines do not count, so to move a module or to re-word it changes no hash.
Nor do a method's `ROLE`, a loader's `SCORED` and a method's function `factored`, which counts where it is what runs
(`function`).
Modules are found and parsed without being imported, which would load torch.
"""

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from twinbench.system.mistakes import Mistake

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)
TOLD = ("ROLE", "SCORED")  # what a module says of its functions
FACTORED = "factored"  # a method's other form, on which no number of `merge` depends


def code(module: str) -> str:
    """Hash of a module's source and, transitively, of what it imports: of its package, its folder and `baselines`.

    Imports of twinbench are not followed: a record names its commit.

    Raises:
        ValueError: there is no such module, or it is not Python.
    """
    packages, folder = {module.partition(".")[0], "baselines"}, located(module).parent
    found, waiting = {}, [module]
    while waiting:
        name = waiting.pop()
        file = location(name)
        if file and file not in found:
            found[file] = digest(file)
            waiting += [
                other for other in _imported(file, name) if _followed(other.partition(".")[0], packages, folder)
            ]
    return _hash([digest(located(module)), *sorted(set(found.values()) - {""})])


@cache  # a process goes on with the code that it has imported
def digest(file: Path) -> str:
    """Hash of one file's source, whatever it imports; empty for a file that does nothing."""
    tree = parsed(file)
    tree = ast.Module([node for node in tree.body if not _apart(node)], [])
    aliases = (alias for node in ast.walk(tree) if isinstance(node, IMPORTS) for alias in node.names if alias.asname)
    renamed = {(alias.name.rpartition(".")[2], alias.asname) for alias in aliases}  # one name may hide another function
    shape = [sorted(pair for pair in renamed if pair[0] != pair[1]), _shape(tree)]
    return "" if shape == [[], ["Module"]] else _hash(shape)


def function(target: str) -> str | None:
    """Hash of one function of a module, ``MODULE.NAME``; None where there is none."""
    module, _, name = target.rpartition(".")
    found = [node for node in parsed(located(module)).body if isinstance(node, ast.FunctionDef) and node.name == name]
    return _hash(_shape(found[-1])) if found else None


def _apart(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name == FACTORED
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in TOLD


@cache
def parsed(file: Path) -> ast.Module:
    """The syntax tree of a Python file.

    Raises:
        ValueError: it is not Python.
    """
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise Mistake(f"{file}, line {error.lineno}: not Python ({error.msg})") from error


def definition(target: str) -> ast.FunctionDef | ast.ClassDef:
    """The function or class that a module defines, of ``MODULE.NAME``.

    Raises:
        ValueError: there is no such module, or it does not define that name itself.
    """
    module, _, name = target.rpartition(".")
    file = location(module)
    if file is None:
        raise Mistake(f"_target_={target}: there is no Python module {module}")
    kinds = ast.FunctionDef | ast.ClassDef
    found = [node for node in parsed(file).body if isinstance(node, kinds) and node.name == name]
    if not found:
        raise Mistake(f"_target_={target}: {file} has no function or class {name}")
    return found[-1]


def located(module: str) -> Path:
    """The file of a module.

    Raises:
        ValueError: there is no such module, or none in Python.
    """
    file = location(module)
    if file is None:
        raise Mistake(f"there is no Python module {module}")
    return file


@cache
def location(module: str) -> Path | None:
    """The file of a module, None where there is none in Python; neither it nor its packages are imported."""
    root, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(root)
    except ValueError:  # such as an empty name, or __main__
        return None
    if spec is None:
        return None
    if not rest:
        files = [Path(spec.origin)] if spec.has_location else []
    else:
        folders = [Path(folder, *rest[:-1]) for folder in spec.submodule_search_locations or ()]
        files = [file for folder in folders for file in (folder / rest[-1] / "__init__.py", folder / f"{rest[-1]}.py")]
    return next((file for file in files if file.suffix == ".py" and file.is_file()), None)


def _followed(package: str, packages: set[str], folder: Path) -> bool:
    file = location(package)
    return package != "twinbench" and (package in packages or (file is not None and file.parent == folder))


def _imported(file: Path, module: str) -> Iterator[str]:
    """The names of all that a module imports; of ``from a import b`` both a and a.b, whichever is a module."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (origin, *(f"{origin}.{alias.name}" for alias in node.names))


def _shape(node: object) -> object:
    """A syntax tree as lists, without positions, documentation and imports.

    Empty fields are left out: versions of Python differ in which there are, and a hash must not.
    """
    if isinstance(node, list):
        return [_shape(item) for item in node if not isinstance(item, IMPORTS)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if name != "ctx" and value is not None}
    if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
        fields["body"] = fields["body"][1:]
    shaped = [[name, _shape(value)] for name, value in fields.items()]
    return [type(node).__name__, *(field for field in shaped if field[1] != [])]


def _hash(shape: list) -> str:
    return hashlib.sha256(repr(shape).encode()).hexdigest()[:12]
