"""Prompt sets of any bytes, any size and any nesting: read, or refused in one line."""

import gzip
import json
import subprocess
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import REPOSITORY
from support.refusals import ROW, any_file, checked, complaint, dumped, texts, values, write

from slm.base.errors import BadInput
from slm.prompts import prompt_rows, prompt_sets, readers, row_mapping, variants
from slm.scorers.confined import CHECKS

fields = st.sampled_from([*prompt_rows.FIELDS, "inputs", "expectations", "x"])
rows = st.dictionaries(fields, values, max_size=5)
almost_rows = st.fixed_dictionaries(
    {"messages": st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": texts}), max_size=2) | values},
    optional={"expected": values, "scorers": values, "tags": values, "id": texts, "cluster": values},
)


file_contents = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.one_of(rows, almost_rows, values).map(dumped), max_size=4).map(b"\n".join),
    st.lists(st.sampled_from([*"[]{}-:,&*!|>'\"#%@`?\n \t", "a", "<<", "!!int", "id", "prompt"])).map(
        lambda words: "".join(words).encode()
    ),
)


def test_a_mapping_of_long_mappings_is_shown_shortened(tmp_path):
    rows = {f"key-{place}": {f"{inner}" * 50: "x" * 500 for inner in range(9)} for place in range(9)}
    said = checked(
        complaint(prompt_sets.read_prompt_set, write(tmp_path / "set.yaml", json.dumps(rows).encode()), "x", CHECKS)
    )
    assert said.endswith("; write a list of rows, each starting with '- '")


@pytest.mark.fault("prompt sets: any bytes at all, as JSONL, CSV or YAML (hypothesis)")
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".yaml"])
@any_file
@given(content=file_contents)
def test_any_file_is_a_prompt_set_or_refused_in_one_line(tmp_path, suffix, content):
    path = tmp_path / f"set{suffix}"
    path.write_bytes(content)
    try:
        prompt_set = prompt_sets.read_prompt_set(path, "x", CHECKS)
    except BadInput as refusal:
        checked(str(refusal))
    else:
        again = tmp_path / "again.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in prompt_rows.canonical_rows(prompt_set.prompts)]
        again.write_text("".join(lines), encoding="utf-8")
        assert prompt_sets.read_prompt_set(again, "x", CHECKS).sha256 == prompt_set.sha256


names = st.sampled_from(["x", "prompt", "inputs", "inputs.x", "messages.0.content", "x.0", "id"])
mappings = st.builds(
    lambda columns, pattern: row_mapping.RowMapping(tuple((theirs, ours) for ours, theirs in columns.items()), pattern),
    st.dictionaries(st.sampled_from(prompt_rows.FIELDS), names, max_size=3),
    st.sampled_from(["", r"\w", "(x)|y", "()", r"(?<=\d).*"]),
)


@pytest.mark.fault("prompt sets: any bytes at all, with any mapped columns (hypothesis)")
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".yaml"])
@any_file
@given(content=file_contents, mapping=mappings)
def test_any_file_with_mapped_columns_is_a_prompt_set_or_refused_in_one_line(tmp_path, suffix, content, mapping):
    path = tmp_path / f"set{suffix}"
    path.write_bytes(content)
    try:
        prompt_set = prompt_sets.read_prompt_set(path, "x", CHECKS, mapping)
    except BadInput as refusal:
        checked(str(refusal))
    else:
        variants.hint(prompt_set.prompts)


COMPRESSED = gzip.compress((json.dumps(ROW) + "\n").encode() * 1000, mtime=0)


@pytest.mark.fault("prompt sets: gzip, whole and truncated")
@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("set.jsonl", COMPRESSED, "set.jsonl: is compressed with gzip; unpack it first"),
        ("set.csv", COMPRESSED[:40], "set.csv: is compressed with gzip; unpack it first"),
        ("set.jsonl.gz", COMPRESSED[:40], "set.jsonl.gz: a prompt set is a .jsonl, .csv, .yaml, .yml file; rename"),
    ],
)
def test_a_compressed_set_is_refused_and_never_unpacked(tmp_path, name, content, line):
    with pytest.raises((EOFError, zlib.error)):
        gzip.decompress(COMPRESSED[:40])
    assert complaint(prompt_sets.read_prompt_set, write(tmp_path / name, content), "x", CHECKS).startswith(line)


def repeated(text: str) -> str:
    return text * ((readers.FILE_BYTES - 100) // len(text))


HOSTILE = {
    "prompt sets: a row of 10 MB": (".jsonl", lambda: json.dumps({"prompt": "x" * 10_000_000}), "line 1: is 9.5 MiB"),
    "prompt sets: 64 MiB of brackets in one row": (".jsonl", lambda: "[" + repeated("[],") + "[]]", "line 1: is"),
    "prompt sets: a CSV header of 64 MiB": (".csv", lambda: repeated("id,prompt,"), "line 1: unknown column"),
    "prompt sets: a CSV row of millions of cells": (".csv", lambda: "id,prompt\n" + repeated(","), "line 2: has"),
    "prompt sets: 64 MiB of empty lines": (".jsonl", lambda: repeated("\n"), ": no rows"),
    "prompt sets: 64 MiB of YAML": (".yaml", lambda: repeated("- [a, b]\n"), ": is larger than 4 MiB; write it as"),
    "prompt sets: a million rows": (
        ".jsonl",
        lambda: "".join(f'{{"prompt": "{number}"}}\n' for number in range(1_000_000)),
        ": has more than 100,000 rows; split it, or draw a sample",
    ),
}
READ = """
import resource, sys
from pathlib import Path
from slm.base.errors import BadInput
from slm.prompts.prompt_sets import read_prompt_set
from slm.scorers.confined import CHECKS
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
try: read_prompt_set(Path(sys.argv[1]), "x", CHECKS)
except BadInput as refusal: print(refusal)
"""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.fault(name)) for name in HOSTILE])
def test_a_hostile_size_is_refused_within_two_gigabytes(tmp_path, name):
    suffix, content, line = HOSTILE[name]
    path = write(tmp_path / f"set{suffix}", content().encode())
    command = [sys.executable, "-c", READ, str(path), str(2 * 2**30)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert line in checked(done.stdout.strip("\n"))


@pytest.mark.fault("prompt sets: YAML bombs and tags")
@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("- &a [x]\n- &b [*a, *a]\n- &c [*b, *b]\n", "not YAML: line 2: the alias *a is not accepted"),
        ("- &a {prompt: x}\n- <<: *a\n", "not YAML: line 2: the alias *a is not accepted"),
        ("- !!python/object/apply:os.system ['true']\n", "not YAML: line 1: could not determine a constructor"),
        ("- !!python/name:os.system\n", "not YAML: line 1: could not determine a constructor"),
        ("- !!binary " + "A" * 10_000 + "\n", "row 1: is b'"),
        ("- {prompt: " + "1:" * 5000 + "1}\n", "row 1: `prompt` is"),
    ],
)
def test_a_yaml_bomb_or_tag_is_refused(tmp_path, content, line):
    said = complaint(prompt_sets.read_prompt_set, write(tmp_path / "set.yaml", content.encode()), "x", CHECKS)
    assert said.startswith("set.yaml") and line in said
