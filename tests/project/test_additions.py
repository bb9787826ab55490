"""Additions as CONTRIBUTING.md describes them, made in a copy of the project: one file, and one registration line."""

import json
import shutil
import zipfile

import pytest
from support import tiny_models
from support.commands import REPOSITORY, call

SCORER = '''
def starts_with(output: str, expected: tuple[str, ...], ignore_case: bool = False) -> Score:
    """1 where the answer begins with one of the expected texts."""
    fold = str.casefold if ignore_case else str
    found = [text for text in expected if fold(output).startswith(fold(text))]
    return Score(float(bool(found)), "begins so" if found else "begins otherwise")
'''
FORMAT = """
def _tsv_rows(text: str, name: str) -> Iterator[tuple[str, object]]:
    header, *lines = text.splitlines()
    for number, line in enumerate(lines, 2):
        yield f"line {number}", dict(zip(header.split("\\t"), line.split("\\t"), strict=True))
"""
SOURCE = """
def _zipped(model: str, revision: str, subfolder: str) -> Source | None:
    path = located(model)
    return Source("zip", path.stem, f"zip:{path}", path) if path is not None and path.suffix == ".zip" else None


def _unzipped(source: Source, onnx: bool) -> Checkpoint:
    def build(target: Path) -> None:
        import zipfile

        zipfile.ZipFile(source.path).extractall(target)

    folder, _ = cache.folder(source.name, {"zip": cache.file_sha256(source.path)}, build)
    return vetted(source, folder)


"""
ENGINE = '''
"""An engine that says what it scores, and has engine=local do it."""

from slm.engines import local
from slm.engines.engine import Request
from slm.prompts.prompt_sets import PromptSet
from slm.verdict.scored_model import ScoredModel

check, read_prompts, differences, release = local.check, local.read_prompts, local.differences, local.release


def score(request: Request, prompt_set: PromptSet) -> ScoredModel:
    print(f"the new engine scores {request.label} on {len(prompt_set.prompts)} prompts")
    return local.score(request, prompt_set)
'''
SCHEDULE = """
# A nightly evaluation on GitLab: put this file into .gitlab-ci.yml, and make a schedule for it under Build.
#
# Replace phi3 in models:/phi3 by the name of your registered model. First set the alias challenger, in Python
# mlflow.MlflowClient().set_registered_model_alias("phi3", "challenger", "1"). There need be no champion.
evaluate:
  image: python:3.11
  timeout: 2 hours
  resource_group: phi3
  script:
    - pip install --require-hashes -r locked.txt
    - mlflow run . --env-manager local -P model_uris=models:/phi3@challenger -P baseline=models:/phi3@champion
      -P prompts=prompts/general.jsonl -P thresholds=gates/default.yaml -P alias=champion -P slot=$CI_PIPELINE_ID
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the project, and a function that puts one line before, or text after, a line of one of its files."""
    copy = tmp_path / "project"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "mlruns", "site", ".*_cache")
    shutil.copytree(REPOSITORY, copy, ignore=ignored)

    def edited(name: str, before: str, text: str):
        file = copy / name
        content = file.read_text(encoding="utf-8")
        assert content.count(before) == 1, f"{name} has {before!r} {content.count(before)} times"
        file.write_text(content.replace(before, text + before), encoding="utf-8")

    return copy, edited


def python(project, code: str, *words, **environment) -> str:
    done = call("python", "-c", code, *words, cwd=project, PYTHONPATH=str(project), **environment)
    assert done.code == 0, done.err
    return done.out.strip()


def test_a_scorer_is_a_function_and_its_name_in_the_registry(project):
    copy, edited = project
    edited("slm/scorers/built_in.py", "\nBUILT_IN: dict", f"{SCORER}\n")
    edited("slm/scorers/built_in.py", "exact_match, contains, regex, choice", "starts_with, ")
    code = (
        "from slm.scorers.confined import CHECKS, score\n"
        "print(score('starts_with', 'Paris, of course', ('paris',), {'ignore_case': True}))\n"
        "print(CHECKS['starts_with'](('x',), {'ignore_case': 3}))"
    )
    scored, refused = python(copy, code).splitlines()
    assert scored == "Score(value=1.0, reason='begins so')"
    assert refused == "option ignore_case of scorer starts_with is 3; true or false belongs there"


def test_a_prompt_format_is_a_reader_and_its_suffix_in_the_registry(project, tmp_path):
    copy, edited = project
    edited("slm/prompts/readers.py", "\nREADERS: dict", f"{FORMAT}\n")
    edited("slm/prompts/readers.py", '    ".csv": _csv_rows,', '    ".tsv": _tsv_rows,\n')
    (tmp_path / "set.tsv").write_text("id\tprompt\texpected\na\tCapital of France?\tParis\n")
    (tmp_path / "set.jsonl").write_text('{"id": "a", "prompt": "Capital of France?", "expected": "Paris"}\n')
    code = (
        "import sys; from pathlib import Path\n"
        "from slm.prompts.prompt_sets import read_prompt_set\n"
        "from slm.scorers.scorer_calls import IN_ROWS\n"
        "print({read_prompt_set(Path(name), name, IN_ROWS).sha256 for name in sys.argv[1:]}.__len__())"
    )
    assert python(copy, code, tmp_path / "set.tsv", tmp_path / "set.jsonl") == "1"


def test_a_model_source_is_two_functions_and_a_line_in_the_registry(project, tmp_path):
    copy, edited = project
    edited("slm/models/checkpoints.py", "KINDS: dict", SOURCE)
    edited("slm/models/checkpoints.py", '    "folder": Kind(', '    "zip": Kind(_zipped, _unzipped),\n')
    with zipfile.ZipFile(tmp_path / "tiny.zip", "w") as archive:
        archive.writestr("config.json", json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
        archive.writestr("model.safetensors", tiny_models.safetensors())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            archive.writestr(name, "{}")
    code = (
        "import sys\nfrom slm.models import checkpoints\n"
        "found = checkpoints.find(sys.argv[1]).fetch()\n"
        "print(found.name, found.source, len(found.manifest))"
    )
    zipped = tmp_path / "tiny.zip"
    printed = python(copy, code, zipped, PHI3_MLFLOW_CACHE=str(tmp_path / "cache"))
    assert printed == f"tiny zip:{zipped} 4"


def test_an_engine_is_a_module_and_its_name_in_the_registry(project, tmp_path, tracking):
    from mlflow.types.schema import ColSpec, Schema

    copy, edited = project
    (copy / "slm" / "engines" / "new_engine.py").write_text(ENGINE.lstrip(), encoding="utf-8")
    edited("slm/base/parameters.py", '"spark": "slm.engines.spark.engine"', '"new": "slm.engines.new_engine", ')
    code = tmp_path / "echo.py"
    code.write_text(
        "from mlflow.models import set_model\nfrom mlflow.pyfunc import PythonModel\n"
        "class Echo(PythonModel):\n"
        "    def predict(self, context, model_input, params=None):\n"
        "        return list(model_input['prompt'])\n"
        "set_model(Echo())\n"
    )
    import mlflow

    signature = mlflow.models.ModelSignature(Schema([ColSpec("string", "prompt")]), Schema([ColSpec("string")]))
    with tracking.start_run():
        uri = tracking.pyfunc.log_model(
            name="echo", python_model=str(code), pip_requirements=[], signature=signature
        ).model_uri
    prompts = tmp_path / "set.jsonl"
    prompts.write_text(json.dumps({"prompt": "one", "expected": "one"}) + "\n")
    done = call(
        *("python", "-m", "entrypoints.evaluate", f"--model_uris={uri}", f"--prompts={prompts}", "--engine=new"),
        *("--trust_code=true", "--traces=false"),
        cwd=copy,
        MLFLOW_TRACKING_URI=tracking.get_tracking_uri(),
        PHI3_MLFLOW_CACHE=str(tmp_path / "cache"),
    )
    assert done.code == 0, done.out + done.err
    assert f"the new engine scores {uri} on 1 prompts" in done.out and "score, over all (1)" in done.out


@pytest.mark.parametrize(
    ("wrong", "failed"),
    [("", "0 failed"), ("timeout:", "validator"), ("slot=", "parameters"), ("resource_group: phi3", "forbids_overlap")],
)
def test_a_schedule_is_a_file_and_a_line_in_the_table_of_its_tests(project, wrong, failed):
    copy, edited = project
    text = SCHEDULE.lstrip().replace(wrong, "typo:" if wrong.endswith(":") else "") if wrong else SCHEDULE.lstrip()
    (copy / "schedules" / "gitlab-ci.yaml").write_text(text, encoding="utf-8")
    line = 'ScheduleFile(json_schema("vendor.gitlab-ci"), "script:", "scripts:", ("resource_group: phi3",))'
    edited("tests/project/test_schedules.py", '    "airflow_dag.py": Sch', f'    "gitlab-ci.yaml": {line},\n')
    selected = "gitlab-ci.yaml or every_file_in_schedules"
    done = call("python", "-m", "pytest", "-q", "tests/project/test_schedules.py", "-k", selected, cwd=copy)
    tests = [line.split("::")[1] for line in done.out.splitlines() if line.startswith("FAILED")]
    assert " 5 passed" in f" {done.out.splitlines()[-1]}" if not wrong else len(tests) == 1 and failed in tests[0], (
        done.out
    )
