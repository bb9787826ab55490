"""The README and the pages of docs/ say what the project does: their commands, names, tables and links."""

import inspect
import json
import re
import shlex
import sys

import pytest
import yaml
from support.commands import REPOSITORY, call

from slm.base.parameters import ALL, ENTRY_POINTS, PARAMETERS

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md"))}
TEXTS = PAGES | {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
SENTENCE = 30  # words


def first_block(heading: str) -> str:
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"```sh\n(.*?)\n```", section, re.DOTALL)[1]


def parts(command: str) -> list[list[str]]:
    return [shlex.split(part) for part in command.split("&&")]


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


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
    assert first_block("Run it") in PAGES["quickstart.md"]


def test_the_test_command_runs_every_test():
    assert parts(first_block("Test it"))[-1] == ["python", "-m", "pytest", "-n", "3"]


def test_every_command_names_entry_points_and_parameters_that_exist():
    names = {parameter.name for parameter in PARAMETERS}
    lines = [line.strip() for text in TEXTS.values() for block in blocks(text, "sh") for line in block.splitlines()]
    runs = [line for line in lines if line.startswith("mlflow run ")]
    assert len(runs) >= 20
    for entry_point in (REPOSITORY / "entrypoints").glob("*.py"):  # `--help` shows these
        text = entry_point.read_text("utf-8").replace("\\\n", "")
        runs += [line.strip() for line in text.splitlines() if line.startswith("    mlflow run ")]
    for line in runs:
        assert "--env-manager" in line, line  # MLflow's default is conda
        words = shlex.split(line)
        assert {words[at + 1] for at, word in enumerate(words) if word == "-e"} <= {*ENTRY_POINTS, "main"}, line
        assert {words[at + 1].split("=")[0] for at, word in enumerate(words) if word == "-P"} <= names, line
    modules = re.findall(r"python -m ((?:entrypoints|slm|benchmarks|docs)[\w.]*)", "\n".join(TEXTS.values()))
    assert len(modules) >= 5
    for module in modules:
        path = REPOSITORY / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda parameter: parameter.name)
def test_the_parameter_table_has_each_parameter_with_its_default(parameter):
    where = "all" if parameter.entry_points == ALL else ", ".join(parameter.entry_points)
    rows = PAGES["parameters.md"].splitlines()
    [row] = [line for line in rows if line.startswith(f"| {parameter.name} | {where} |")]
    _, _, _, default, *_ = (cell.strip(" `") for cell in row.split("|"))
    expected = str(parameter.default).lower() if isinstance(parameter.default, bool) else str(parameter.default)
    assert default == (expected or "empty")


def test_the_parameter_page_is_what_its_script_writes():
    from docs import tables

    assert tables.page("parameters.md") == PAGES["parameters.md"], "run python -m docs.tables"


def test_the_page_on_trust_counts_the_attempts_to_load_a_changing_model():
    from slm.models import wrappers

    assert f"After {wrappers.TRIES} attempts, the model is refused." in PAGES["trust.md"]


def test_every_scorer_is_described():
    from slm.scorers.built_in import BUILT_IN
    from slm.scorers.judges import JUDGES

    assert all(f"| `{name}` |" in PAGES["scorers-and-judges.md"] for name in BUILT_IN)
    assert all(name in PAGES["scorers-and-judges.md"] for name in JUDGES)


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_that_is_named_and_every_link_exists(name):
    folder = REPOSITORY if name in ("README.md", "CONTRIBUTING.md") else REPOSITORY / "docs"
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXTS[name]):
        assert link.startswith("http") or (folder / link).exists(), link
    rooted = r"`((?:prompts|gates|schedules|deployments|entrypoints|benchmarks|docs|slm|tests)/[\w/.-]*)`"
    for path in re.findall(rooted, TEXTS[name]):
        assert (REPOSITORY / path).exists() or (REPOSITORY / "slm" / path).exists(), path


def test_every_page_is_in_the_sites_navigation_and_in_the_index():
    listed = json.dumps(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert set(re.findall(r"[\w-]+\.md", listed)) == set(PAGES)
    assert all(f"({page})" in PAGES["index.md"] for page in PAGES if page != "index.md")
    assert all(f"(docs/{page})" in README for page in PAGES if page != "index.md")


def test_the_example_prompt_set_row_and_gate_are_valid(tmp_path):
    from slm.prompts.prompt_sets import read_prompt_set
    from slm.scorers.confined import CHECKS
    from slm.verdict.gate import read_thresholds

    file = tmp_path / "set.jsonl"
    file.write_text(blocks(PAGES["prompt-sets.md"], "json")[0])
    assert len(read_prompt_set(file, "", CHECKS).prompts) == 1
    assert len(read_thresholds(blocks(PAGES["gates-and-promotion.md"], "yaml")[0], "gate.yaml")) == 5


def test_the_example_rows_of_scorers_are_valid(tmp_path):
    from slm.prompts.prompt_sets import read_prompt_set
    from slm.scorers.built_in import BUILT_IN
    from slm.scorers.confined import CHECKS

    file = tmp_path / "set.jsonl"
    file.write_text(blocks(PAGES["scorers-and-judges.md"], "jsonl")[0])
    prompts = read_prompt_set(file, "", CHECKS).prompts
    asked = {(call.name, option) for prompt in prompts for call in prompt.scorers for option in call.options}
    assert asked == {
        (name, option)
        for name in CHECKS
        for option in set(inspect.signature(BUILT_IN[name]).parameters) - {"output", "expected"}
    }


def test_every_block_of_data_or_code_can_be_read():
    for text in TEXTS.values():
        for block in blocks(text, "json"):
            assert json.loads(block)
        for block in blocks(text, "jsonl"):
            assert all(json.loads(line) for line in block.splitlines())
        for block in blocks(text, "yaml"):
            assert yaml.safe_load(block)
        for block in blocks(text, "python"):
            compile(block, "page", "exec")


def test_the_printed_table_has_the_lines_that_the_program_prints():
    from slm.report import summary

    block = blocks(PAGES["quickstart.md"], "text")[0]
    for line in summary.lines([]):
        assert line.label.split(" (")[0] in block


@pytest.mark.parametrize("name", TEXTS)
def test_no_sentence_is_long(name):
    text = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "#", "!", "[Quickstart]", "<!--"))]
    for line in prose:
        for sentence in re.split(r"(?<=[.:;?])\s+", re.sub(r"\(([^)]*)\)|`[^`]*`", "x", line)):
            assert len(sentence.split()) <= SENTENCE, sentence


def test_the_sizes_of_the_rooms_are_those_of_today():
    """Within a tenth: a small change needs no new table."""

    def totals(text: str) -> dict[str, int]:
        return {
            room: int(lines.replace(",", "")) for room, lines in re.findall(r"\| `(\w+)` \| \d+ \| ([\d,]+) \|", text)
        }

    from docs import tables

    today = totals(tables.sizes())
    assert totals(PAGES["architecture.md"]) == pytest.approx(today, rel=0.1) and today, "run python -m docs.tables"


def test_the_pages_build_as_a_site_without_a_warning(tmp_path):
    done = call(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path, NO_MKDOCS_2_WARNING="1")
    assert done.code == 0 and "WARNING" not in done.err, done.err
    assert (tmp_path / "architecture" / "index.html").is_file()
