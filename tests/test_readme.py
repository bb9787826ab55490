"""The README's commands and names are those of the project."""

import re
import shlex

import pytest
from conftest import REPOSITORY

from slm.base.parameters import ALL, ENTRY_POINTS, PARAMETERS

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def first_block(heading: str) -> str:
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"```sh\n(.*?)\n```", section, re.DOTALL)[1]


def parts(command: str) -> list[list[str]]:
    return [shlex.split(part) for part in command.split("&&")]


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_the_first_block_is_one_command_that_installs_from_files_that_are_there(heading):
    command = first_block(heading)
    assert "\n" not in command
    venv, activate, install, _ = parts(command)
    assert venv == ["python3", "-m", "venv", ".venv"]
    assert activate == [".", ".venv/bin/activate"]
    files = [word for word in install if word.endswith(".txt")]
    assert len(files) == 1 and "--require-hashes" in install
    assert all((REPOSITORY / name).is_file() for name in files)


def test_the_run_command_is_mlflow_run_with_the_local_environment():
    assert parts(first_block("Run it"))[-1] == ["mlflow", "run", ".", "--env-manager", "local"]


def test_the_test_command_runs_every_test():
    assert parts(first_block("Test it"))[-1] == ["python", "-m", "pytest"]


def test_every_mlflow_run_line_names_entry_points_and_parameters_that_exist():
    names = {parameter.name for parameter in PARAMETERS}
    lines = [line for line in README.splitlines() if line.startswith("mlflow run ")]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line)
        assert {words[at + 1] for at, word in enumerate(words) if word == "-e"} <= set(ENTRY_POINTS)
        assert {words[at + 1].split("=")[0] for at, word in enumerate(words) if word == "-P"} <= names


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda parameter: parameter.name)
def test_the_parameter_table_has_each_parameter_with_its_default(parameter):
    [row] = [line for line in README.splitlines() if line.startswith(f"| {parameter.name} |")]
    _, _, where, default, *_ = (cell.strip(" `") for cell in row.split("|"))
    assert where == ("all" if parameter.entry_points == ALL else ", ".join(parameter.entry_points))
    expected = str(parameter.default).lower() if isinstance(parameter.default, bool) else str(parameter.default)
    assert default == (expected or "empty")


def test_every_scorer_and_file_that_is_named_exists():
    from slm.scorers.built_in import BUILT_IN

    assert all(name in README for name in BUILT_IN)
    for name in re.findall(r"`(prompts/\w+\.jsonl)`|\]\(([\w/.]+)\)", README):
        assert (REPOSITORY / (name[0] or name[1])).exists()


def test_the_example_prompt_set_row_and_gate_are_valid(tmp_path):
    from slm.prompts.prompt_sets import read_prompt_set
    from slm.scorers.confined import CHECKS
    from slm.verdict.gate import read_thresholds

    file = tmp_path / "set.jsonl"
    file.write_text(re.search(r"```json\n(.*?)```", README, re.DOTALL)[1])
    assert len(read_prompt_set(file, "", CHECKS).prompts) == 1
    assert len(read_thresholds(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1], "gate.yaml")) == 5


def test_the_printed_table_has_the_lines_that_the_program_prints():
    from slm.report import summary

    block = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1]
    for line in summary.lines([]):
        assert line.label.split(" (")[0] in block
