"""The package's rooms: each imports only the rooms below it, and no file is part of a circle."""

import ast
from pathlib import Path

import pytest
from support.commands import REPOSITORY

ROOMS = (  # from the top floor down
    "evaluation",
    "report",
    "engines",
    "verdict",
    "scorers",
    "serving",
    "tracking",
    "answers",
    "models",
    "prompts",
    "base",
)
LONGEST = 600  # lines of a file
FILES = sorted((REPOSITORY / "slm").rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """The modules of this package that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            folder = (
                ".".join(path.relative_to(REPOSITORY).parent.parts) if node.level else ""
            )  # the parts of the wrapper
            module = ".".join(part for part in (folder, node.module) if part)
            if module.split(".")[0] == "slm":
                names = [f"{module}.{name.name}" for name in node.names]
                found |= {name if name in MODULES else module for name in names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "slm"}
    return found


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    below = ROOMS[ROOMS.index(room) :]
    for module, imported in IMPORTS.items():
        if module != "slm" and room_of(module) == room:
            assert {room_of(name) for name in imported} <= set(below), module


def test_every_file_is_in_a_room_and_every_room_says_what_it_is_for():
    assert {room_of(module) for module in MODULES if module != "slm"} == set(ROOMS)
    for room in ROOMS:
        said = ast.get_docstring(ast.parse((REPOSITORY / "slm" / room / "__init__.py").read_text(encoding="utf-8")))
        assert said.split("\n\n")[0].count("?") == 1 and "Start with" in said and "import" in said


def test_no_file_is_part_of_a_circle():
    def reached(module: str, seen: frozenset = frozenset()) -> frozenset:
        for name in IMPORTS.get(module, set()) - seen:
            seen = reached(name, seen | {name})
        return seen

    assert [module for module in IMPORTS if module in reached(module)] == []


def test_no_file_is_long():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert [name for name, count in lines.items() if count >= LONGEST] == []


def test_the_wrapper_that_mlflow_logs_needs_no_other_file_of_this_project():
    for name, imported in IMPORTS.items():
        if name == "slm.models.chat_model" or name.startswith("slm.models.chat_parts"):
            assert all(other.startswith("slm.models.chat_parts") for other in imported), name


def test_the_tests_mirror_the_rooms_and_none_imports_another():
    tests = REPOSITORY / "tests"
    folders = {path.name for path in tests.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*ROOMS, "project", "support"}
    files = sorted(tests.rglob("test_*.py"))
    assert {path.parent.parent for path in files} == {tests}
    modules = {path.stem for path in files} | {"conftest"}
    for path in tests.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
        assert not modules & {name.split(".")[0] for name in names}, path
