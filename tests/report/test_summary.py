"""The report in words: which scorer it names, junit.xml, and a table in Markdown."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from support.scored import prompts, report, scored

from slm.report import summary
from slm.verdict import estimation, gate


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
