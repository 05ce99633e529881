"""How the code is laid out: imports go one way, and every file can be read in one sitting."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 400


def modules():
    """Name within the package -> file; the kernels are the package's, wherever they lie."""
    found = {}
    for folder, prefix in (("adamw_triton", ()), ("kernels", ("kernels",))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*prefix, *path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name, path, known):
    """Modules of the package that one imports, wherever in the file: in functions and for type checkers too."""
    is_package = path.name == "__init__.py"
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = name.split(".") if name else []
            base = base[: len(base) - node.level + is_package]
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}" if source else alias.name
                found.add(inner if inner in known else source)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(n.split(".")[0] == "adamw_triton" for n in names), f"{path}: use relative imports"
    return found - {name}


def graph():
    known = modules()
    return {name: imports(name, path, known) & known.keys() for name, path in known.items()}


def find_cycle(edges):
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        found = next((cycle for other in sorted(edges[name]) if (cycle := visit(other))), None)
        path.pop()
        done.add(name)
        return found

    return next((cycle for name in sorted(edges) if (cycle := visit(name))), None)


def test_a_cycle_would_be_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.fast
def test_imports_go_one_way():
    edges = graph()
    assert {"plan", "launch"} <= edges["optimizer"] | edges["plan"], "imports are not seen"
    assert find_cycle(edges) is None


@pytest.mark.parametrize(
    ("who", "whom"),
    [
        ("everything but the package itself", "extras"),
        ("kernels", "everything outside of kernels"),
        ("everything but launch", "kernels"),
    ],
)
def test_rooms_are_entered_by_one_door(who, whom):
    for name, others in graph().items():
        if whom == "extras":
            reached = {other for other in others if other.startswith("extras") and not name.startswith("extras")}
            assert not reached or name == "", f"{name} imports {reached}"
        elif who == "kernels":
            assert not name.startswith("kernels") or all(other.startswith("kernels") for other in others), name
        else:
            reached = {other for other in others if other.startswith("kernels") and not name.startswith("kernels")}
            assert not reached or name == "launch", f"{name} imports {reached}"


@pytest.mark.fast
def test_files_are_short():
    folders = ("adamw_triton", "kernels", "bench", "tests")
    lengths = {path: len(path.read_text().splitlines()) for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_LINES}
