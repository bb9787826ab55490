"""The report in words: which scorer it names, junit.xml, and a table in Markdown."""

import io
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from support.scored import prompts, report, scored

from slm.report import summary
from slm.verdict import estimation, fidelity, gate, statistics
from slm.verdict.fidelity import Fidelity, TokenFidelity


def test_a_single_scorer_is_told_by_its_corrected_p_and_not_by_its_own():
    """Two scorers with p = 0.031 each: 0.063 after Holm's correction, beyond chance only without the correction."""
    prompt_set = prompts(60)
    ours = [{"contains": 1.0, "regex": 1.0}] * 6 + [{"contains": 0.0, "regex": 0.0}] * 54
    theirs = [{"contains": 0.0, "regex": 0.0}] * 60
    pair = [scored(values, prompt_set) for values in (ours, theirs)]
    compared = estimation.differences(*pair, prompt_set)
    assert compared["contains"].p_value < 0.05 < estimation.holm_p_values(compared)["contains"]
    said = report(pair, prompt_set, gate.Verdict("none", ()), compared).remarks
    assert not any(", contains:" in line or ", regex:" in line for line in said)
    alone = {name: compared[name] for name in ("contains", "score")}
    said = report(pair, prompt_set, gate.Verdict("none", ()), alone).remarks
    assert any(", contains:" in line and "after Holm" in line for line in said)


@pytest.mark.parametrize("state", ["inconclusive", "regress"])
def test_junit_shows_a_rule_that_did_not_pass_as_a_failure(state):
    check = gate.Check("score/mean", "min 0.6", state, "the answer \x1b[31m\x00 holds controls \ud800")
    answered = scored([{"contains": 1.0}], prompts(1))
    failed = replace(answered.samples[0], error={"type": "refused", "message": "a\x00\x1b\x0bb"})
    text = summary.junit(report([replace(answered, samples=(failed,))], prompts(1), gate.Verdict(state, (check,))))
    [suite] = ElementTree.fromstring(text.encode())
    assert (suite.get("failures"), suite.get("errors")) == ("1", "1")
    [failure] = suite.iter("failure")
    assert failure.get("type") == state


def test_a_pipe_in_a_cell_ends_no_cell_of_the_markdown_table():
    answered = scored([{"a|b": 1.0}], prompts(1))
    text = summary.markdown(
        report([replace(answered, model=replace(answered.model, label="x|y"))], prompts(1), gate.Verdict("none", ()))
    )
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {3}  # two columns: no cell was cut in two


# The whole text of each form -----------------------------------------------------------------------------------------

RIGHT, WRONG = {"contains": 1.0, "number": 1.0}, {"contains": 0.0, "number": 1.0}
COSTS = {
    "output_tokens_per_second": 81.25,
    "latency_seconds/p50": 0.0123,
    "latency_seconds/p95": 1.5,
    "model_load_seconds": 0.0,
    "peak_memory_bytes": 1_234_567_890.0,
    "model_bytes": 4200.0,
}


def pair() -> summary.Report:
    four = prompts(4)
    ours, theirs = scored([RIGHT, WRONG, WRONG, WRONG], four), scored([RIGHT, RIGHT, WRONG, RIGHT], four)
    ours = replace(ours, model=replace(ours.model, label="models:/m/2"), metrics=ours.metrics | COSTS)
    theirs = replace(theirs, model=replace(theirs.model, label="models:/m@champion"))
    checks = (
        gate.Check("score/mean", "min 0.5", "pass", "fine"),
        gate.Check("score/mean", "max_drop 0.1", "regress", "fell"),
        gate.Check("rows", "min_ratio 1", "none", "there is no champion yet"),
    )
    compared = estimation.differences(ours, theirs, four)
    made = report([ours, theirs], four, gate.Verdict("regress", checks), compared)
    return replace(made, title="set")


def test_the_lines_of_the_table_are_scores_then_costs():
    lines = [(line.label, line.cells, line.section) for line in summary.lines(pair().models)]
    assert lines == [
        ("contains (4)", ("0.25 [0.01, 0.81]", "0.75 [0.19, 0.99]"), False),
        ("number (4)", ("1.00 [0.40, 1.00]", "1.00 [0.40, 1.00]"), False),
        ("score, over all (4)", ("0.62 [0.18, 0.95]", "0.88 [0.17, 1.00]"), True),
        ("rows failed", ("0", "0"), False),
        ("rows unscored", ("0", "0"), False),
        ("rows cut at max_tokens", ("0", "0"), False),
        ("output tokens per second", ("81.2", "n/a"), True),
        ("latency p50, s", ("0.012", "0.10"), False),
        ("latency p95, s", ("1.50", "0.10"), False),
        ("model load, s", ("0.00", "0.00"), False),
        ("peak memory", ("1,235 MB", "n/a"), False),
        ("model size", ("4 kB", "n/a"), False),
    ]


def test_counts_that_differ_between_models_are_both_told_and_pass_at_k_follows_the_score():
    repeated = [replace(one, repeat=turn) for one in scored([RIGHT], prompts(1)).samples for turn in range(3)]
    twice = replace(scored([RIGHT], prompts(1)), samples=tuple(repeated))
    twice = replace(twice, estimates=estimation.estimate(twice.samples, prompts(1)))
    four = scored([RIGHT, WRONG, WRONG, WRONG], prompts(4))
    labels = [line.label for line in summary.lines([twice, four])]
    assert labels[:5] == [
        "contains (1/4)", "number (1/4)", "score, over all (1/4)", "pass@3, over all (1)", "pass^3, over all (1)",
    ]  # fmt: skip
    assert summary.lines([twice, four])[3].cells == ("1.00 [0.03, 1.00]", "n/a")  # the exact interval of 1 of 1


def test_a_model_without_a_score_or_a_sample_has_its_lines_too():
    unscored = scored([{"contains": None}], prompts(1))
    line = summary.lines([replace(unscored, samples=())])[0]
    assert (line.label, line.cells) == ("score, over all (0)", ("n/a",))


def test_a_model_without_counts_has_no_failed_rows_and_no_remark_on_listed_ones():
    model = scored([], prompts(0))
    made = report([replace(model, metrics={})], prompts(0), gate.Verdict("none", ()))
    assert made.remarks == ["m was not given max_tokens, temperature, top_p, stop, seed: not declared by it"]
    assert 'tests="1" failures="0" errors="0"' in summary.junit(made)


def gap(p_value: float) -> statistics.Difference:
    return statistics.Difference(0.1, 0.04, 0.02, 0.18, p_value, 20, 0.11)


def differences_told(**p_values: float) -> list[str]:
    """The scorers whose difference the remarks tell, in their order."""
    two = [scored([RIGHT], prompts(1)) for _ in range(2)]
    compared = {name: gap(p_value) for name, p_value in p_values.items()}
    said = report(two, prompts(1), gate.Verdict("none", ()), compared).remarks
    return [line.split(", ")[1].split(":")[0] for line in said if " minus " in line]


def test_the_overall_score_is_told_first_and_then_each_scorer_beyond_chance():
    assert differences_told(zebra=0.001, contains=0.001, score=0.9) == ["score", "contains", "zebra"]


def test_a_corrected_p_of_5_percent_and_an_unknown_one_are_not_beyond_chance():
    assert differences_told(contains=0.05) == []
    assert differences_told(contains=0.049, number=math.nan) == ["contains"]


@pytest.mark.parametrize(
    ("low", "high", "p", "word"),
    [
        (0.02, 0.18, 0.03, "better"),
        (0.02, 0.18, 0.05, "perhaps better"),
        (0.02, 0.18, math.nan, "perhaps better"),
        (-0.02, 0.22, 0.03, "perhaps better"),
        (0.0, 0.2, 0.05, "can't tell"),
        (-0.18, -0.02, 0.03, "worse"),
        (-0.18, -0.02, 0.06, "perhaps worse"),
        (-0.22, 0.02, 0.04, "perhaps worse"),
    ],
)
def test_interval_and_p_value_must_agree_for_a_clear_word(low, high, p, word):
    gap = statistics.Difference((low + high) / 2, 0.04, low, high, p, 20, 0.11)
    assert summary.direction(gap) == word
    two = [scored([RIGHT], prompts(1)) for _ in range(2)]
    made = report(two, prompts(1), gate.Verdict("none", ()), {"score": gap})
    told = [line for line in made.remarks if " minus " in line]
    doubt = f": {word}, as interval and p-value disagree; " if "perhaps" in word else "20 pairs; "
    assert len(told) == 1 and doubt in told[0]


def test_a_baseline_that_comes_first_hides_no_difference_of_the_next_model():
    made = pair()
    turned = replace(made, models=made.models[::-1], differences=made.differences[::-1], baseline=0)
    assert [line for line in turned.remarks if " minus " in line] == [
        line for line in made.remarks if " minus " in line
    ] and any("models:/m/2 minus models:/m@champion, score:" in line for line in turned.remarks)


def test_the_remarks_tell_the_difference_and_the_flips():
    ignored, _, difference, flips = pair().remarks
    assert ignored == "models:/m/2 was not given max_tokens, temperature, top_p, stop, seed: not declared by it"
    figures = (
        r"-0\.25 \[-0\.\d\d, \+0\.\d\d\], p = 0\.50, 4 pairs; a difference under 0\.\d\d would not have been found"
    )
    assert re.fullmatch(rf"models:/m/2 minus models:/m@champion, score: {figures}", difference), difference
    assert flips == "models:/m/2: 2 worse (p1, p3); 0 better"


def test_the_remarks_tell_what_a_model_ignored_what_was_reused_and_what_is_not_listed():
    four = prompts(4)
    model = scored([RIGHT] * 4, four, unmeasured="2 of 4 answers are reused")
    model = replace(
        model, metrics=model.metrics | {"rows": 4000.0}, record={"reproducible": "statistically comparable: x"}
    )
    made = report([model], four, gate.Verdict("none", ()))
    assert made.remarks == [
        "m was not given max_tokens, temperature, top_p, stop, seed: not declared by it",
        "m, done again: statistically comparable: x",
        "m: no speed, latency or memory, because 2 of 4 answers are reused; resume=false measures them",
        "m: 4 of 4,000 answers are listed, flips, tags and fidelity are of these alone; "
        "all other figures are of all answers",
    ]


def test_the_line_on_fidelity_says_what_was_not_compared_and_why():
    compared = Fidelity((TokenFidelity("p0", *(np.ones(9),) * 3),), 3, "fidelity=all compares all")
    made = pair()
    models = replace(made.models[0], fidelity=compared), made.models[1]
    made = replace(made, models=models, changes=(fidelity.estimates(compared, {}), {}))
    [line] = summary.fidelity_remark(made, 0)
    assert line.endswith(", 9 tokens of 1 answer (3 answers left out; fidelity=all compares all)")


def test_many_flips_and_a_long_id_are_cut():
    assert summary._ids("worse", tuple(f"p{place}" for place in range(6))) == "6 worse (p0, p1, p2, p3, p4, p5)"
    assert summary._ids("worse", tuple(f"p{place}" for place in range(7))) == "7 worse (p0, p1, p2, p3, p4, p5, …)"
    assert summary._ids("better", ()) == "0 better"
    assert summary._ids("worse", ("x" * 80, "x" * 81)) == f"2 worse ({'x' * 80}, {'x' * 79}…)"


def test_markdown_is_title_table_remarks_and_gate():
    text = summary.markdown(pair())
    assert text.startswith(
        "# set\n\n|  | models:/m/2 | models:/m@champion |\n| --- | ---: | ---: |\n| contains (4) | 0.25 "
    )
    assert text.endswith(
        "; 0 better\n\ngate: **regress**\n- score/mean min 0.5: pass, fine\n"
        "- score/mean max_drop 0.1: regress, fell\n- rows min_ratio 1: none, there is no champion yet\n"
    )


def test_junit_has_a_suite_per_model_and_a_case_per_rule():
    assert summary.junit(pair()) == (
        "<?xml version='1.0' encoding='utf-8'?>\n"
        '<testsuites name="set">'
        '<testsuite name="models:/m/2" tests="4" failures="1" errors="0">'
        '<testcase classname="gate" name="score/mean min 0.5" />'
        '<testcase classname="gate" name="score/mean max_drop 0.1"><failure type="regress" message="fell" /></testcase>'
        '<testcase classname="gate" name="rows min_ratio 1"><skipped message="there is no champion yet" /></testcase>'
        '<testcase classname="rows" name="every row is answered" /></testsuite>'
        '<testsuite name="models:/m@champion" tests="1" failures="0" errors="0">'
        '<testcase classname="rows" name="every row is answered" /></testsuite></testsuites>\n'
    )


def test_junit_names_the_rows_that_failed():
    two = scored([RIGHT, RIGHT], prompts(2))
    failed = replace(two.samples[0], error={"type": "refused", "message": "too long"})
    model = replace(two, samples=(failed, two.samples[1]), metrics=two.metrics | {"rows_failed": 1.0})
    text = summary.junit(report([model], prompts(2), gate.Verdict("none", ())))
    assert '<error type="rows_failed" message="1 row: p0: too long" />' in text and 'errors="1"' in text
    unlisted = replace(two, metrics=two.metrics | {"rows_failed": 30.0})
    assert 'message="30 rows: "' in summary.junit(report([unlisted], prompts(2), gate.Verdict("none", ())))


def test_junit_names_20_failed_rows_at_most_in_one_line_without_controls():
    model = scored([RIGHT] * 21, prompts(21))
    failed = tuple(replace(one, error={"type": "refused", "message": "too\nlong\x1b"}) for one in model.samples)
    text = summary.junit(report([replace(model, samples=failed)], prompts(21), gate.Verdict("none", ())))
    [error] = ElementTree.fromstring(text.encode()).iter("error")
    told = "; ".join(f"p{place}: too long " for place in range(20))
    assert error.get("message") == f"21 rows: {told}"


def test_what_markdown_or_a_terminal_would_not_show_as_text_is_written_out():
    assert summary.escaped("a|b\n<c>") == "a&#124;b &#60;c>".replace(">", "&#62;")
    assert summary.visible("a\x00b\u202ec") == "a[U+0000]b[U+202E]c"


def test_the_console_s_table_is_bold_in_its_title_and_heads_and_has_its_figures_at_the_right():
    console = Console(file=io.StringIO(), width=70, force_terminal=True, color_system="standard")
    console.print(summary.table(pair()))
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("\x1b[1mset") and "\x1b[1m" in lines[2]
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines]
    assert re.fullmatch(r"┃ +┃ +m/2 ┃ +m@champion ┃", plain[2])
    assert any(re.fullmatch(r"│ rows failed +│ +0 │ +0 │", line) for line in plain)


def test_a_long_name_is_folded_in_the_console_s_table_and_not_cut():
    made = pair()
    long = replace(made.models[0], model=replace(made.models[0].model, label="a-very-long-name-of-a-model/12345"))
    console = Console(file=io.StringIO(), width=60)
    console.print(summary.table(replace(made, models=(long, made.models[1]))))
    heads = console.file.getvalue().split("┡")[0]
    cells = [line.split("┃")[2].strip() for line in heads.splitlines() if line.startswith("┃")]
    assert "".join(cells) == "a-very-long-name-of-a-model/12345"


def test_a_long_scorer_is_folded_too():
    name = "word-problems/exact_match/flexible-extract"
    model = scored([{name: 1.0}], prompts(1))
    console = Console(file=io.StringIO(), width=50)
    console.print(summary.table(report([model] * 2, prompts(1), gate.Verdict("none", ()))))
    cells = [line.split("│")[1].strip() for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert "".join(cells).startswith(f"{name} (1)")
    assert "…" not in console.file.getvalue()


def test_the_console_s_table_has_short_names_and_is_never_cut():
    console = Console(file=io.StringIO(), width=70)
    console.print(summary.table(pair()))
    shown = console.file.getvalue()
    assert shown.startswith("set") and "m@champion" in shown and "models:/" not in shown
    assert re.search(r"contains \(4\)\s+│\s+0\.25 \[0\.01, 0\.81\] │\s+0\.75 \[0\.19, 0\.99\] │", shown)
    assert shown.count("├") == 2  # before the overall score, and before the costs


@pytest.mark.parametrize(
    ("baseline", "state", "name"),
    [
        (1, "regress", "regress, score 0.62: m/2 vs m@champion on set"),
        (0, "none", "score 0.88: m@champion vs m/2 on set"),
        (None, "pass", "pass: 2 models on set"),
        (None, "none", "evaluated: 2 models on set"),
    ],
)
def test_a_run_is_named_by_its_end_and_what_it_did(baseline, state, name):
    assert summary.run_name(replace(pair(), baseline=baseline, verdict=gate.Verdict(state, ()))) == name


def test_a_run_of_one_model_is_named_by_its_score_if_there_is_one():
    four, none = prompts(4), gate.Verdict("none", ())
    assert summary.run_name(report([scored([RIGHT, WRONG, WRONG, WRONG], four)], four, none)) == "score 0.62: m on set"
    unscored = scored([{"contains": None}] * 4, four)
    assert summary.run_name(report([unscored], four, none)) == "evaluated: m on set"


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (0, "0 kB"),
        (4200, "4 kB"),
        (98_501, "99 kB"),
        (99_999, "100 kB"),
        (100_000, "0.1 MB"),
        (950_000.5, "1.0 MB"),
        (999_999, "1.0 MB"),
        (1e6, "1 MB"),
        (2_000_500_500, "2,001 MB"),
        (2.5e9, "2,500 MB"),
    ],
)
def test_a_size_is_told_in_its_unit(size, told):
    assert summary.megabytes(size) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0.00"), (0.0123, "0.012"), (0.0999, "0.1"), (0.1, "0.10"), (1.005, "1.00"), (12.3, "12.30")],
)
def test_seconds_are_never_0_00_but_for_0(seconds, told):
    assert summary.seconds_of(seconds) == told


@pytest.mark.parametrize(
    ("p", "told"),
    [
        (0.0, "< 0.001"),
        (0.000999, "< 0.001"),
        (0.001, "= 0.001"),
        (0.0996, "= 0.100"),
        (0.1, "= 0.10"),
        (1, "= 1.00"),
        (math.nan, "n/a"),
    ],
)
def test_a_p_value_is_never_0_00(p, told):
    assert summary.p_value(p) == told
