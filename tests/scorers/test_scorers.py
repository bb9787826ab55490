"""Each built-in scorer against a table of answers, with the exact value and the reason a person reads."""

import inspect
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from slm.base.wording import did_you_mean, quoted
from slm.scorers import confined
from slm.scorers.built_in import BUILT_IN, Score, json_schema
from slm.scorers.confined import call_error, score, score_without_bounds

NAMES = ("exact_match", "contains", "regex", "choice", "number", "json_schema", "token_f1", "rouge_l", "math")


def value_of(name: str, output: str, expected: tuple[str, ...], **options) -> float | None:
    return BUILT_IN[name](output, expected, **options).value


def test_the_built_in_names_are_those_of_the_public_interface():
    assert tuple(BUILT_IN) == NAMES


@pytest.mark.parametrize(
    ("output", "expected", "options", "value"),
    [
        ("Paris", ("Paris",), {}, 1.0),
        ("  Paris\n", ("Paris ",), {}, 1.0),
        ("Paris.", ("Paris",), {}, 0.0),
        ("paris", ("Paris",), {}, 0.0),
        ("Rome", ("Paris", "Rome"), {}, 1.0),
        ("", ("Paris",), {}, 0.0),
        ("PARIS", ("Paris",), {"ignore_case": True}, 1.0),
        ("STRASSE", ("straße",), {"ignore_case": True}, 1.0),
        ("Paris!", ("Paris",), {"ignore_punctuation": True}, 1.0),
        ("New - York.", ("New York",), {"ignore_punctuation": True}, 1.0),
        ("¿París?", ("París",), {"ignore_punctuation": True}, 1.0),
        ("“paris”", ("Paris",), {"ignore_punctuation": True, "ignore_case": True}, 1.0),
    ],
)
def test_exact_match(output, expected, options, value):
    assert value_of("exact_match", output, expected, **options) == value


@pytest.mark.parametrize(
    ("output", "expected", "options", "value"),
    [
        ("It is paris.", ("Paris",), {}, 1.0),
        ("It is paris.", ("Paris",), {"ignore_case": False}, 0.0),
        ("London", ("Paris", "Rome"), {}, 0.0),
        ("concatenate", ("cat",), {}, 0.0),  # a short word
        ("concatenate", ("cat",), {"whole_word": False}, 1.0),
        ("concatenate", ("caten",), {}, 1.0),
        ("It is not so.", ("no",), {}, 0.0),
        ("100", ("10",), {}, 0.0),
        ("\u6771\u4eac\u3067\u3059", ("\u6771\u4eac",), {}, 1.0),  # no blanks between words
        ("concatenate", ("cat",), {"whole_word": True}, 0.0),
        ("a cat.", ("cat",), {"whole_word": True}, 1.0),
        ("_cat_", ("cat",), {"whole_word": True}, 1.0),
        ("it costs $5 (net)", ("$5 (net)",), {"whole_word": True}, 1.0),
        ("x = 15", ("5",), {"whole_word": True}, 0.0),
        ("", ("Paris",), {}, 0.0),
    ],
)
def test_contains(output, expected, options, value):
    assert value_of("contains", output, expected, **options) == value


@pytest.mark.parametrize(
    ("output", "expected", "options", "value"),
    [
        ("call 555-1234", (), {"pattern": r"\d{3}-\d{4}"}, 1.0),
        ("call me", (), {"pattern": r"\d{3}-\d{4}"}, 0.0),
        ("colour", ("colou?r",), {}, 1.0),
        ("COLOR", ("colou?r",), {}, 0.0),
        ("COLOR", ("colou?r",), {"ignore_case": True}, 1.0),
        ("b", ("^a$", "^b$"), {}, 1.0),
        ("xyz", ("xyz",), {"pattern": "^a"}, 0.0),
    ],
)
def test_regex(output, expected, options, value):
    assert value_of("regex", output, expected, **options) == value


@pytest.mark.fault("process: a scorer's pattern that never ends")
def test_a_pattern_that_backtracks_for_ever_leaves_the_answer_unscored_after_its_time_limit():
    result = score("regex", "a" * 5000 + "!", (), {"pattern": "^(a|a?)+$"})
    assert result == Score(None, "the pattern '^(a|a?)+$' took longer than 1 s on this answer")


def test_an_expected_text_that_is_no_pattern_leaves_the_answer_unscored():
    result = score("regex", "x", ("(",), {})
    assert result == Score(None, "'(' is not a regular expression: missing ) at position 1")


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        # nothing but the letter, in either case
        ("B", "B"),
        ("b", "B"),
        (" b.\n", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("a", "A"),
        ("A.", "A"),
        # a capital in a longer answer
        ("B)", "B"),
        ("B) Paris", "B"),
        ("B. Paris is the capital.", "B"),
        ("**B** because it is blue", "B"),
        ("_B_ it is", "B"),
        ("The answer is B.", "B"),
        ("The answer is A", "A"),
        ("Answer: A", "A"),
        ("I pick A here", "A"),
        ("A is correct.", "A"),
        ("A because it fits", "A"),
        ("A\nbecause it fits", "A"),
        ("A - Paris", "A"),
        (r"\boxed{C}", "C"),
        ("答案是B", "B"),
        ("A 是正确的", "A"),
        ("B is wrong, so C", "C"),
        # the article and the rest of English
        ("A cat sat there", None),
        ("A cat sat there, so D.", "D"),
        ('"A cat" is what I see.', None),
        ("Hm. A 4-door car.", None),
        ("the answer is b, I think", "B"),
        # part of something longer
        ("A-level", None),
        ("C++ and C#", None),
        ("U.S.A.", None),
        ("A/B test", None),
        ("It's vitamin-B", None),
        ("ABBA", None),
        ("A's", None),
        ("E", None),
        ("", None),
    ],
)
def test_choice_reads_the_chosen_letter_and_not_the_article(output, letter):
    for wanted in "ABCD":
        assert value_of("choice", output, (wanted,)) == float(wanted == letter), wanted


@pytest.mark.parametrize(
    ("output", "expected", "options", "value"),
    [
        ("I think it is H", ("H",), {"choices": "ABCDEFGHI"}, 1.0),
        ("I think it is I.", ("I",), {"choices": "ABCDEFGHI"}, 1.0),
        ("E", ("e",), {"choices": "ABCDE"}, 1.0),
        ("C", ("B", "C"), {}, 1.0),
        ("C", ("E",), {}, None),
        ("C", ("Paris",), {}, None),
        ("C", (), {}, None),
    ],
)
def test_choice_options_and_expected_letters(output, expected, options, value):
    assert value_of("choice", output, expected, **options) == value


def test_a_long_answer_of_many_letters_is_scored():
    assert score("choice", "A b. " * 200_000 + "D", ("D",), {}) == Score(1.0, "chose D, the first letter")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("1,234.5", "1234.5"),
        ("It is -3.", "-3"),
        ("2e3", "2000"),
        ("50%", "50"),
        ("$12", "12"),
        ("-$3", "-3"),
        ("$1,234,567.89.", "1234567.89"),
        ("it is \u22123", "-3"),
        (".5", "0.5"),
        ("No.5", "5"),
        ("first 4, then 5", "5"),
        ("1,2,3", "3"),
        ("x=-3", "-3"),
        ("(4)", "4"),
        ("**42**", "42"),
        (r"\boxed{7}", "7"),
        ("12kg of CO2", "12"),
        ("3 atoms in H2O", "3"),
        ("答案是42個", "42"),
        ("1.2.3", "3"),
        ("0.10", "0.1"),
        ("#### 18", "18"),
        ("007", "7"),
    ],
)
def test_number_reads_the_number_of_a_plain_answer(output, expected):
    assert value_of("number", output, (expected,)) == 1.0
    assert value_of("number", output, (expected + "1",)) == 0.0


@pytest.mark.parametrize(
    ("output", "expected", "options", "value"),
    [
        ("none at all", ("5",), {}, 0.0),
        ("5", ("five",), {}, 1.0),
        ("8-5", ("5",), {}, 0.0),  # a subtraction or a range is no answer
        ("10-20", ("20",), {}, 0.0),
        ("5", ("5 apples",), {}, None),
        ("5", ("4", "5"), {}, 1.0),
        ("5", ("five", "5"), {}, 1.0),
        ("50", ("50%",), {}, 1.0),
        ("1234.5", ("$1,234.50",), {}, 1.0),
        ("1.1", ("1",), {"tolerance": 0.1}, 1.0),
        ("1.11", ("1",), {"tolerance": 0.1}, 0.0),
        ("102", ("100",), {"tolerance": 2}, 1.0),
        ("9007199254740993", ("9007199254740992",), {}, 0.0),
        ("1e999999", ("1",), {"tolerance": 1}, 0.0),
    ],
)
def test_number_tolerance_and_expected_numbers(output, expected, options, value):
    assert value_of("number", output, expected, **options) == value


SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("output", "schema", "value", "reason"),
    [
        ('{"age": 3}', SCHEMA, 1.0, "fits the schema"),
        ('```json\n{"age": 3}\n```', SCHEMA, 1.0, "fits the schema, in a code fence"),
        ('\n```\n{"age": 3}\n```\n', SCHEMA, 1.0, "fits the schema, in a code fence"),
        ('{"age": "3"}', SCHEMA, 0.0, "does not fit the schema at $.age: \"'3' is not of type 'integer'\""),
        ("{}", SCHEMA, 0.0, "does not fit the schema at $: \"'age' is a required property\""),
        ("[1]", None, 1.0, "is JSON"),
        (
            'Sure: {"age": 3}',
            SCHEMA,
            0.0,
            "not JSON: Expecting value: line 1 column 1 (char 0); got 'Sure: {\"age\": 3}'",
        ),
        ("NaN", None, 0.0, "not JSON: NaN is not a JSON value; got 'NaN'"),
    ],
)
def test_json_schema(output, schema, value, reason):
    assert score("json_schema", output, (), {"schema": schema}) == Score(value, reason)


def test_json_schema_never_fetches_a_remote_reference():
    result = score("json_schema", "{}", (), {"schema": {"$ref": "http://example.com/schema.json"}})
    assert result.value is None
    assert "Unresolvable" in result.reason


def test_json_that_is_nested_too_deeply_is_a_wrong_answer_and_no_crash():
    assert value_of("json_schema", "[" * 100_000, ()) == 0.0


@pytest.mark.parametrize(
    ("output", "expected", "value"),
    [
        ("The Eiffel Tower!", ("eiffel tower",), 1.0),  # SQuAD drops case, punctuation and articles
        ("the cat sat", ("a cat sat down",), 0.8),  # 2 shared of 2 and 3 words: 2*2/(2+3)
        ("red red", ("red",), 2 / 3),
        ("blue", ("red",), 0.0),
        ("", ("red",), 0.0),
        ("", ("the",), 1.0),
        ("cat", ("dog", "cat"), 1.0),
    ],
)
def test_token_f1(output, expected, value):
    assert value_of("token_f1", output, expected) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("output", "expected", "value"),
    [
        # Lin 2004, section 3.1: "police killed the gunman" against its two candidates, 0.75 and 0.5
        ("police kill the gunman", ("police killed the gunman",), 0.75),
        ("the gunman kill police", ("police killed the gunman",), 0.5),
        ("police kill the gunman", ("nothing alike", "police killed the gunman"), 0.75),
        ("", ("police",), 0.0),
        ("日本", ("日本",), None),
    ],
)
def test_rouge_l(output, expected, value):
    assert value_of("rouge_l", output, expected) == value


MATH = [
    (r"\frac{1}{2}", ("0.5",), 1.0),
    ("The answer is 1/2.", (r"\frac{1}{2}",), 1.0),
    (r"So it is \boxed{42}.", ("42",), 1.0),
    ("$(x-1)(x+1)$", ("x^2-1",), 1.0),
    ("2x+3", ("3+2x",), 1.0),
    ("2x+4", ("2x+3",), 0.0),
    ("2", ("2x+3",), 0.0),
    ("no idea", ("5",), 0.0),
    ("5", ("4", "5"), 1.0),
    ("5", ("Paris",), None),
]


@pytest.mark.parametrize(("output", "expected", "value"), MATH)
def test_math(output, expected, value):
    assert score("math", output, expected, {}).value == value


def test_math_works_outside_the_main_thread():
    values = []
    thread = threading.Thread(target=lambda: values.extend(score("math", o, e, {}).value for o, e, _ in MATH))
    thread.start()
    thread.join()
    assert values == [value for _, _, value in MATH]


@pytest.mark.parametrize(
    ("name", "output", "expected", "reason"),
    [
        ("exact_match", "London", ("Paris",), "expected 'Paris', got 'London'"),
        ("exact_match", "Paris", ("Paris",), "equals 'Paris'"),
        ("exact_match", "x", ("a", "b", "c", "d", "e"), "expected 'a' or 'b' or 'c' or 2 more, got 'x'"),
        ("contains", "a\nb", ("Paris",), r"expected 'Paris', got 'a\nb'"),
        ("contains", "x" * 500, ("y",), f"expected 'y', got '{'x' * 27}...{'x' * 28}'"),
        ("contains", "", ("y",), "expected 'y', got ''"),
        ("contains", "y", ("y",), "contains 'y'"),
        ("regex", "b", ("^a",), "expected '^a', got 'b'"),
        ("choice", "C", ("B",), "expected B, chose C"),
        ("choice", "Paris", ("B",), "expected B, found no choice in 'Paris'"),
        ("choice", "C", ("E",), "expected 'E', which is not one of the choices ABCD"),
        ("number", "it is 5", ("6",), "expected '6', got '5', the last number"),
        ("number", "none", ("6",), "expected '6', found no number in 'none'"),
        ("number", "5", ("six eggs",), "expected 'six eggs', which is not a number"),
        ("token_f1", "a b c", ("b d",), "token F1 0.50 with 'b d', got 'a b c'"),
        ("rouge_l", "a b", ("a b",), "ROUGE-L 1.00 with 'a b', got 'a b'"),
        ("math", "4", ("5",), "expected '5', got '4'"),
        ("math", "5", ("Paris",), "expected 'Paris', which cannot be read as mathematics"),
    ],
)
def test_the_reason_says_what_was_expected_and_what_came(name, output, expected, reason):
    assert score(name, output, expected, {}).reason == reason


@pytest.mark.parametrize("name", [name for name in NAMES if name != "json_schema"])
def test_an_answer_of_which_nothing_is_expected_is_unscored_and_not_zero(name):
    assert score(name, "x", (), {}).value is None


def ascii_start(text: str) -> str:
    return ascii(text[:8])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "output", ["", "\0", "a" * 100_000, "\ud800", "{" * 2000, "1e99999999", "((((", "\u202e"], ids=ascii_start
)
def test_any_answer_gets_a_value_in_the_unit_interval_or_a_reason_in_one_line(name, output):
    result = score(name, output, ("5",), {})
    assert result.value is None or 0 <= result.value <= 1
    assert result.reason
    assert "\n" not in result.reason
    assert len(result.reason) < 300


def test_an_unexpected_exception_leaves_the_answer_unscored_with_its_reason(monkeypatch):
    def broken(output, expected):
        raise RuntimeError("disk on fire")

    monkeypatch.setitem(BUILT_IN, "broken", broken)
    assert score_without_bounds("broken", "x", ("y",), {}) == Score(None, "broken failed: RuntimeError: 'disk on fire'")


@pytest.mark.parametrize("name", NAMES)
def test_a_score_within_bounds_is_the_one_without(name):
    for output, expected, _ in [
        *MATH,
        ("", ("x",), 0),
        ("\ud800\0\n", ("\ud800\0",), 0),
        ("B) 4, Paris", ("Paris", "B"), 0),
    ]:
        assert score(name, output, expected, {}) == score_without_bounds(name, output, expected, {})


@pytest.mark.parametrize(
    ("name", "expected", "options", "error"),
    [
        ("contains", ("x",), {"whole_word": True}, None),
        ("number", ("1",), {"tolerance": 1}, None),
        ("json_schema", (), {}, None),
        ("json_schema", (), {"schema": SCHEMA}, None),
        ("regex", (), {"pattern": "a+"}, None),
        ("contains", (), {}, "scorer contains needs `expected`"),
        ("regex", (), {}, "scorer regex needs `expected`"),
        (
            "contains",
            ("x",),
            {"wholeword": True},
            "scorer contains has no option 'wholeword' (did you mean 'whole_word'?); it has ignore_case, whole_word",
        ),
        ("math", ("1",), {"strict": True}, "scorer math has no option 'strict'; it has none"),
        ("contains", ("x",), {"ignore_case": "yes"}, "option ignore_case of scorer contains is 'yes'; true or false"),
        ("number", ("1",), {"tolerance": True}, "option tolerance of scorer number is true; a number"),
        ("number", ("1",), {"tolerance": -1}, "option tolerance is -1; 0 or a positive number belongs there"),
        ("choice", ("A",), {"choices": "abcd"}, "option choices is 'abcd'; capital letters"),
        ("choice", ("A",), {"choices": ["A", "B"]}, "option choices of scorer choice is ['A', 'B']; text"),
        ("regex", (), {"pattern": "("}, "option pattern is '(', which is not a regular expression: missing )"),
        ("choice", ("Paris",), {}, "`expected` is 'Paris', which scorer choice can't read; write one letter of ABCD"),
        ("number", ("5 apples",), {}, "`expected` is '5 apples', which scorer number can't read; write a number"),
        (
            "number",
            ("2+2=4\n#### 4",),
            {},
            r"`expected` is '2+2=4\n#### 4', which scorer number can't read; use expected_",
        ),
        ("math", ("Paris",), {}, "`expected` is 'Paris', which scorer math can't read; write mathematics"),
        ("math", ("x^2-1",), {}, None),
        ("json_schema", (), {"schema": {"type": "objekt"}}, "option schema is not a JSON schema:"),
    ],
)
def test_a_call_is_checked_before_any_model_runs(name, expected, options, error):
    found = call_error(name, expected, options)
    assert (found is None) if error is None else found.startswith(error), found


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_default_and_a_kind_that_the_check_knows(name):
    output, expected, *options = inspect.signature(BUILT_IN[name]).parameters.values()
    assert (output.name, expected.name) == ("output", "expected")
    assert all(o.default is not o.empty and o.annotation in confined.OPTION_KINDS for o in options)


def test_importing_the_scorers_loads_no_heavy_library():
    import subprocess

    heavy = "{'regex', 'jsonschema', 'rouge_score', 'math_verify', 'sympy', 'numpy', 'torch'}"
    code = f"import sys, slm.scorers; print(sorted({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), (3, "3"), ("a\nb", r"'a\nb'"), ([16**5000], "a number of thousands of digits")],
)
def test_quoted_shows_any_value_in_one_short_line(value, text):
    assert quoted(value) == text


def test_did_you_mean_names_the_nearest_or_nothing():
    assert did_you_mean("exactmatch", NAMES) == " (did you mean 'exact_match'?)"
    assert did_you_mean("zzz", NAMES) == ""


def test_a_schema_that_refers_to_an_address_fetches_nothing():
    hits: list[str] = []

    class Counted(BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"type": "object"}).encode())

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Counted)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/schema.json"
    try:
        with pytest.raises(Exception, match="Unresolvable"):
            json_schema("{}", (), {"$ref": address})
    finally:
        server.shutdown()
    assert hits == []
