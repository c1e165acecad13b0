"""The core takes time and randomness as arguments and keeps an order in everything it does.

import-linter checks the imports between packages. The syntax trees show the rest: calls of clocks and random sources,
and iteration over sets, whose order differs from run to run and would make a recorded session replay differently.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_FORBIDDEN_MODULES = {"asyncio", "logging", "os.urandom", "random", "secrets", "select", "socket", "threading", "time"}
_FORBIDDEN_CALLS = {"os.urandom", "os.getrandom", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
_FORBIDDEN_CALLS |= {"uuid.uuid1", "uuid.uuid4", "datetime.datetime.now", "datetime.datetime.utcnow", "open", "print"}
_SET_TYPES = {"set", "frozenset", "Set", "FrozenSet", "AbstractSet", "MutableSet"}
_SET_METHODS = {"union", "intersection", "difference", "symmetric_difference"}
_ORDERED = {"sorted", "len", "min", "max", "sum", "any", "all", "set", "frozenset", "bool"}  # don't expose the order
_ITERATING = {"list", "tuple", "iter", "enumerate", "map", "filter", "zip", "deque", "dict", "reversed", "chain"}


def test_the_core_asks_no_clock_and_no_random_source() -> None:
    assert [finding for path in _core_files() for finding in impurities(path.read_text(), path.name)] == []


def test_the_core_iterates_over_no_set() -> None:
    assert [finding for path in _core_files() for finding in set_iterations(path.read_text(), path.name)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from time import monotonic",
        "import os\nkey = os.urandom(32)",
        "from os import urandom",
        "import random",
        "from datetime import datetime\nnow = datetime.now()",
        "import socket",
    ],
)
def test_a_hidden_input_is_found(source: str) -> None:
    assert impurities(source, "example") != []


@pytest.mark.parametrize(
    "source",
    [
        "for x in {1, 2}: pass",
        "def f(xs: set[int]):\n    for x in xs: pass",
        "def f():\n    xs = set()\n    return [x for x in xs]",
        "class A:\n    def __init__(self):\n        self.xs = set()\n    def f(self):\n        yield from self.xs",
        "class A:\n    def f(self, xs):\n        self.xs: set[int] = xs\n    def g(self):\n        list(self.xs)",
        "import attrs\n@attrs.define\nclass A:\n    xs: frozenset[int]\ndef f(a):\n    return list(a.xs)",
        "def f(a: dict, b: dict):\n    for key in a.keys() - b.keys(): pass",
        "def f(xs: set[int]):\n    return xs.pop()",
        "def f(xs: set[int], ys: set[int]):\n    return tuple(xs | ys)",
        "def f(xs: set[int]):\n    return [*xs]",
        "def f(xs: set[int]):\n    return ', '.join(xs)",
    ],
)
def test_an_iteration_over_a_set_is_found(source: str) -> None:
    assert set_iterations(source, "example") != []


@pytest.mark.parametrize(
    "source",
    [
        "def f(xs: set[int]):\n    return sorted(xs)",
        "def f(xs: set[int]):\n    return 3 in xs and len(xs)",
        "def f(xs: dict[int, int]):\n    for x in xs: pass",
        "def f():\n    xs = set()\ndef g(xs):\n    for x in xs: pass",
        "def f(xs: set[int]):\n    for x in sorted(xs - {1}): pass",
    ],
)
def test_ordered_uses_are_allowed(source: str) -> None:
    assert set_iterations(source, "example") == []


def impurities(source: str, name: str) -> list[str]:
    """Imports and calls that bring in time, randomness or I/O, as "file:line what"."""
    findings = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            findings += [(node, f"imports {alias.name}") for alias in node.names if alias.name in _FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            imported = {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
            findings += [(node, f"imports {module}") for module in sorted(imported & _FORBIDDEN_MODULES)]
        elif isinstance(node, ast.Call) and _dotted(node.func) in _FORBIDDEN_CALLS:
            findings.append((node, f"calls {_dotted(node.func)}"))
    return [f"{name}:{node.lineno} {what}" for node, what in findings]


def set_iterations(source: str, name: str) -> list[str]:
    """Places where the order of a set shows, as "file:line what"."""
    tree = ast.parse(source)
    attributes = _set_attributes(tree)
    findings: list[str] = []
    for scope in _scopes(tree):
        is_set = _SetKnowledge(scope, attributes)
        for node in _own_nodes(scope):
            findings += [
                f"{name}:{node.lineno} iterates over the set `{ast.unparse(one)}`"
                for one in _iterated(node)
                if is_set(one)
            ]
    return findings


class _SetKnowledge:
    """Which expressions of one function are sets, as far as assignments and annotations tell."""

    def __init__(self, scope: ast.AST, attributes: frozenset[str]) -> None:
        self._attributes = attributes
        self._names: set[str] = set()
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = (*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs)
            self._names |= {one.arg for one in arguments if _is_set_annotation(one.annotation)}
        for node in _own_nodes(scope):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                if _is_set_annotation(node.annotation):
                    self._names.add(node.target.id)
            elif isinstance(node, ast.Assign) and self(node.value):
                self._names |= {target.id for target in node.targets if isinstance(target, ast.Name)}

    def __call__(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self._names
        if isinstance(node, ast.Attribute):
            return node.attr in self._attributes
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub | ast.BitAnd | ast.BitOr | ast.BitXor):
            return any(self(side) or _is_keys_view(side) for side in (node.left, node.right))
        return _makes_set(node)


def _iterated(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions that this node goes through one by one, in their order."""
    if isinstance(node, ast.For | ast.comprehension):
        yield node.iter
    elif isinstance(node, ast.YieldFrom | ast.Starred):
        yield node.value
    elif isinstance(node, ast.Call):
        function = _dotted(node.func).rpartition(".")[2]
        if function in _ITERATING or function in {"join", "extend"}:
            yield from node.args
        elif function == "pop" and not node.args and isinstance(node.func, ast.Attribute):
            yield node.func.value


def _own_nodes(scope: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """The nodes of a function (or of the module) without those of the functions inside it.

    A generator expression that is the argument of `sorted` and its like may go through a set: its order is lost there.
    """
    waiting = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call) and _dotted(node.func) in _ORDERED:
            unordered = [one for one in node.args if isinstance(one, ast.GeneratorExp | ast.ListComp)]
            children = [child for child in children if child not in unordered]
        if isinstance(node, ast.SetComp):
            children = [node.elt]
        for child in children:
            if isinstance(child, ast.comprehension):
                child.lineno = node.lineno
        waiting += children
        yield node


def _scopes(tree: ast.Module) -> Iterator[ast.AST]:
    yield tree
    yield from (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    )


def _set_attributes(tree: ast.Module) -> frozenset[str]:
    """Names of attributes that are declared or assigned as sets anywhere in the module."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
            found |= {one.target.id for one in fields if _is_set_annotation(one.annotation)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
            if _is_set_annotation(node.annotation):
                found.add(node.target.attr)
        elif isinstance(node, ast.Assign) and _makes_set(node.value):
            found |= {target.attr for target in node.targets if isinstance(target, ast.Attribute)}
    return frozenset(found)


def _makes_set(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return _dotted(node.func) in {"set", "frozenset"} or _dotted(node.func).rpartition(".")[2] in _SET_METHODS
    return isinstance(node, ast.Set | ast.SetComp)


def _is_set_annotation(annotation: ast.expr | None) -> bool:
    if isinstance(annotation, ast.Subscript):
        annotation = annotation.value
    if isinstance(annotation, ast.BinOp):
        return _is_set_annotation(annotation.left) or _is_set_annotation(annotation.right)
    return annotation is not None and _dotted(annotation).rpartition(".")[2] in _SET_TYPES


def _is_keys_view(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "keys"


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of names, else what stands at its end."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        prefix = _dotted(node.value)
        return f"{prefix}.{node.attr}" if prefix else node.attr
    return ""


def _core_files() -> list[Path]:
    return sorted((_ROOT / "firezone_tunnel/core").rglob("*.py"))
