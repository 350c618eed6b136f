# SPDX-License-Identifier: Apache-2.0
"""The shape of the source tree: who may import whom, and how large a module may be.

The rooms of the product stand on floors; a module imports its own room and what is below.
Three trees of checks (tests, vm-tests, benchmarks) share `testbed`, and nothing else.
"""

import ast
import gc
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
CHECKS = ("tests", "vm-tests", "benchmarks")
TREES = ("nbdstream", "testbed", "fuzz", "plugins", *CHECKS)
LINES_MOST = 400
ALIKE_MOST = 5  # lines in a row that may stand in two places

# The product's floors, lowest first. A room is a folder of nbdstream/ or a module of its
# top level. Rooms of one floor do not import each other.
FLOORS = (
    {"errors", "extents", "text", "web"},
    {"tasks", "health", "verity"},
    {"units", "export", "qmp"},
    {"net"},
    {"leaf", "backing", "server", "guest"},
    {"disk"},
    {"streamer"},
    {"control"},
    {"handover"},
    {"options", "rebase"},
    {"service"},
    {"migrate", "pivot", "store"},
    {"cli"},
    {"__main__"},
)


def name_of(path: Path) -> str:
    """A module's dotted name, as it is imported from the top of the checkout."""
    parts = path.relative_to(TOP).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def path_of(name: str) -> Path:
    """Where a module of that name is."""
    path = TOP / f"{name.replace('.', '/')}.py"
    return path if path.exists() else TOP / name.replace(".", "/") / "__init__.py"


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the checkout, parsed, by its dotted name.

    Garbage collection is off meanwhile: it would walk a million new objects again and again,
    none of which is garbage, and take longer than the parser.
    """
    gc.disable()
    try:
        return {
            name_of(path): ast.parse(path.read_text(), str(path))
            for tree in TREES
            for path in sorted((TOP / tree).rglob("*.py"))
        }
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def sources_do_not_stay() -> Iterator[None]:
    """While they are there, each full garbage collection takes more than half a second longer,
    in the tests of other modules too."""
    yield
    sources.cache_clear()


def statements(tree: ast.Module, *, deferred: bool) -> Iterator[ast.stmt]:
    """Import statements: those that run with the module, or (`deferred`) inside functions too.

    What stands under `if TYPE_CHECKING` never runs, so it makes no circle; it still counts
    as knowing of the other module.
    """
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        if not deferred and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not deferred and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        pending += ast.iter_child_nodes(node)


@cache
def imports(name: str, *, deferred: bool = True) -> frozenset[str]:
    """The modules of the checkout that a module imports, as far as there is one."""
    package = name.split(".") if (TOP / name.replace(".", "/")).is_dir() else name.split(".")[:-1]
    found = set()
    for node in statements(sources()[name], deferred=deferred):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.ImportFrom)
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            wanted = [f"{prefix}.{alias.name}" for alias in node.names]
        for target in wanted:
            while target and target not in sources():
                target = target.rpartition(".")[0]
            if target:
                found.add(target)
    return frozenset(found - {name})


def in_tree(tree: str) -> list[str]:
    return [name for name in sources() if name.split(".")[0] == tree]


def arrows(tree: str, allowed: set[str]) -> list[str]:
    """Imports of a tree that lead elsewhere than to itself and the `allowed` trees."""
    return [
        f"{name} -> {target}"
        for name in in_tree(tree)
        for target in sorted(imports(name))
        if target.split(".")[0] not in {tree, *allowed}
    ]


def test_the_map_of_imports_is_not_empty() -> None:
    assert imports("nbdstream.cli.serve") >= {"nbdstream.service"}
    assert imports("vm-tests.test_boot") >= {"testbed.guests.systems"}


def test_the_product_imports_only_itself() -> None:
    assert arrows("nbdstream", set()) == []
    assert arrows("plugins", {"nbdstream"}) == []


def test_the_testbed_imports_only_the_product() -> None:
    assert arrows("testbed", {"nbdstream"}) == []
    assert arrows("fuzz", {"nbdstream", "testbed"}) == []


@pytest.mark.parametrize("tree", CHECKS)
def test_checks_share_only_the_testbed(tree: str) -> None:
    # tests/test_fuzz.py replays the corpus of the fuzz targets.
    fuzz = {"fuzz"} if tree == "tests" else set()
    assert arrows(tree, {"nbdstream", "testbed", *fuzz}) == []


def test_no_module_of_the_guests_is_imported_by_a_bare_name() -> None:
    """vm-tests/ is no package: whatever its tests share has to be in the testbed."""
    bare = {path.stem for path in (TOP / "vm-tests").glob("*.py")}
    found = [
        f"{name} -> {target}"
        for name, tree in sources().items()
        for node in statements(tree, deferred=True)
        for target in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
        if target.split(".")[0] in bare
    ]
    assert found == []


def test_no_module_changes_where_modules_are_found() -> None:
    """The nbdkit plugin may: the interpreter is nbdkit's, and knows nothing of our checkout."""
    guilty = [
        name
        for name, tree in sources().items()
        if not name.startswith("plugins.")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
    ]
    assert guilty == []


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_no_worker_starts_what_is_sandboxed() -> None:
    """The sandbox ends a program with the thread that started it. trio starts processes in
    workers, which end when they have been idle for a while."""
    for path in (TOP / "nbdstream" / "backing").rglob("*.py"):
        assert ".open_process(" not in path.read_text(), path


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(name) for name in in_tree("nbdstream")} - {""}
    assert rooms == set().union(*FLOORS), "give each new room its place in FLOORS"


def test_no_import_of_the_product_leads_upwards() -> None:
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    upwards = [
        f"{name} -> {target}"
        for name in in_tree("nbdstream")
        for target in sorted(imports(name))
        if (mine := room_of(name)) and (other := room_of(target)) and mine != other
        if floor[other] >= floor[mine]
    ]
    assert upwards == []


def circles() -> Iterator[list[str]]:
    """Modules that import each other in a circle while they are loaded."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> Iterator[list[str]]:
        state[name] = 1
        path.append(name)
        for target in sorted(imports(name, deferred=False)):
            if state.get(target) == 1:
                yield [*path[path.index(target) :], target]
            elif target not in state:
                yield from visit(target)
        path.pop()
        state[name] = 2

    for name in sources():
        if name not in state:
            yield from visit(name)


def test_no_imports_go_in_a_circle() -> None:
    assert list(circles()) == []


def test_long_modules_say_why_they_are_one_thing() -> None:
    """A docstring that says so has the words "one module" in it."""
    found = []
    for name, tree in sources().items():
        lines = len(path_of(name).read_text().splitlines())
        if lines > LINES_MOST and "one module" not in (ast.get_docstring(tree) or ""):
            found.append(f"{name}: {lines} lines")
    assert found == []


def raised(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """What a function raises itself, by name: neither what it calls, nor what it raises again."""
    found: set[str] = set()
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            found.add(ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc))
        pending += ast.iter_child_nodes(node)
    return found


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The public functions of a module and the public methods of its public classes."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            pending += node.body
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
            node.name == "__init__" or not node.name.startswith("_")
        ):
            yield node


def test_public_functions_say_what_they_raise() -> None:
    """Left out: click's commands, whose docstrings are their help, and what refers to the
    docstring of its interface."""
    found = []
    for name in in_tree("nbdstream"):
        for function in public_functions(sources()[name]):
            docstring = ast.get_docstring(function) or ""
            decorators = " ".join(map(ast.unparse, function.decorator_list))
            if "click." in decorators or ".command(" in decorators or docstring.startswith("See `"):
                continue
            if raised(function) and "Raises" not in docstring:
                found.append(f"{name}:{function.lineno} {function.name}")
    assert found == []


def comparable(path: Path, tree: ast.Module) -> list[tuple[int, str]]:
    """The lines of a module that must not stand twice, with their numbers.

    Left out: blank lines and comments, lone punctuation, docstrings, imports, and tables
    (assignments at the top level of a module or class). Of a function's signature its name
    is left, because an implementation repeats the signatures of its interface.
    """
    passed_over: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            passed_over |= set(range(node.lineno + 1, node.body[0].lineno))
        elif isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            passed_over |= set(range(node.lineno, (node.end_lineno or 0) + 1))
        if isinstance(node, ast.Module | ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.Assign | ast.AnnAssign):
                    passed_over |= set(range(child.lineno, (child.end_lineno or 0) + 1))
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip()
        if number not in passed_over and any(map(str.isalnum, text)) and not text.startswith("#"):
            lines.append((number, text.partition("(")[0] if "def " in text else text))
    return lines


def test_no_six_lines_stand_in_two_places() -> None:
    first: dict[tuple[str, ...], str] = {}
    found = []
    for name, tree in sources().items():
        path = path_of(name)
        lines = comparable(path, tree)
        for start in range(len(lines) - ALIKE_MOST):
            run = tuple(text for _, text in lines[start : start + ALIKE_MOST + 1])
            place = f"{name}:{lines[start][0]}"
            other = first.setdefault(run, place)
            if other != place:
                found.append(f"{place} ~ {other}")
    assert found == []
