"""Which modules of vitlib a script imports, told from its text: nothing is imported to find out. Level 0."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent


def sources(script: str | Path, *, package: Path = PACKAGE) -> list[Path]:
    """The files of `package` that `script` imports, also inside functions and through each other, sorted.

    A change in one of them makes what the script wrote out of date; a change in another module does not.
    """
    waiting, found = [Path(script)], set()
    while waiting:
        new = imported(waiting.pop(), package=package) - found
        found |= new
        waiting += new
    return sorted(found)


def imported(script: str | Path, *, package: Path = PACKAGE) -> set[Path]:
    """The files of `package` that `script` itself names in an import."""
    tree = ast.parse(Path(script).read_text(encoding="utf-8"))
    names = {name for node in ast.walk(tree) for name in _names(node, package.name)}
    parts = [name.split(".") for name in names]
    files = {package / f"{(rest or ['__init__'])[0]}.py" for first, *rest in parts if first == package.name}
    return {file for file in files if file.exists()}


def _names(node: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that an import may load: of `from a import b` both `a` and `a.b`, maybe a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        inside = package if node.level else ""
        module = ".".join(filter(None, (inside, node.module)))
        yield from (module, *(f"{module}.{alias.name}" for alias in node.names))
