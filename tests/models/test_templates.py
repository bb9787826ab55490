"""Faults in a model's chat template: whatever it does, it is refused in one line, in bounded time and memory."""

import sys

import pytest
from support.commands import call

from slm.models import chat_model

USER = [{"role": "user", "content": "Hi"}]
TIME = "the model's chat template took more than 5 s of processor time"
MEMORY = "the model's chat template took more than 512 MiB of memory"
REFUSED = "the model's chat template refused the conversation: "

# In a process that the system ends after a minute of its own processor time, or at 4 GiB
RENDER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
from slm.models import chat_model
try:
    chat_model.render(sys.argv[1], {}, [{"role": "user", "content": "Hi"}])
except chat_model.Refused as refusal:
    print(refusal)
print(chat_model.render("{{ messages[0].content }}", {}, [{"role": "user", "content": "The next one"}]))
"""
LOOP = "{% for i in range(100000) %}", "{% endfor %}"
FAULTS = {
    "models: a chat template that divides by zero": (
        "{{ 1/0 }}",
        f"{REFUSED}ZeroDivisionError: division by zero",
    ),
    "models: a chat template that loops without end": (
        3 * LOOP[0] + 3 * LOOP[1],
        TIME,
    ),
    "models: a chat template that computes a number without end": ("{{ 9 ** (9 ** 9) }}", TIME),
    "models: a chat template that formats a billion digits": ("{{ '%0999999999d' % 1 }}", MEMORY),
    "models: a chat template that doubles a text": (
        "{% set it = namespace(text='xx') %}{% for i in range(60) %}{% set it.text = it.text ~ it.text %}{% endfor %}",
        MEMORY,
    ),
    "models: a chat template that recurses": (
        "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
        f"{REFUSED}RecursionError: maximum recursion depth exceeded",
    ),
    "models: a chat template of nested brackets": (
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        f"{REFUSED}RecursionError: maximum recursion depth exceeded",
    ),
    "models: a chat template that makes a long text": (
        LOOP[0] + "{{ 'x' * 1000 }}" + LOOP[1],
        f"{REFUSED}its text has 100,000,000 characters",
    ),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.fault(name)) for name in FAULTS])
def test_a_hostile_template_is_one_line_and_the_next_conversation_is_rendered(name):
    template, line = FAULTS[name]
    done = call(sys.executable, "-c", RENDER, template)
    assert done.code == 0, done.err[-500:]
    refusal, following = done.out.splitlines()
    assert refusal.startswith(line) and len(refusal) < 400
    assert following == "The next one"


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{{ raise_exception('Only user turns') }}", "Only user turns"),
        ("{{ raise_exception('two\nlines \x1b[2J\ud800') }}", "two lines [2J"),
        ("{{ raise_exception('x' * 100000) }}", "x" * 300),
        ("{% generation %}x{% endgeneration %}", "Encountered unknown tag 'generation'."),
        ("{% include 'other' %}", "no loader for this environment specified"),
        ("{{ messages[0].content + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe."),
    ],
)
def test_what_a_template_refuses_is_told_in_one_printable_line(template, line):
    with pytest.raises(chat_model.Refused) as refused:
        chat_model.render(template, {}, USER)
    assert str(refused.value).startswith(f"{REFUSED}{line}")
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400


def test_special_tokens_that_are_named_like_the_conversation_are_refused():
    with pytest.raises(chat_model.Refused, match="multiple values for keyword argument 'messages'"):
        chat_model.render("x", {"messages": "y"}, USER)


def test_a_long_conversation_is_rendered_whole():
    text = "\ud83d\ude00 half: \ud800 NUL: \0 " * 50_000
    rendered = chat_model.render("{{ messages[0].content }}", {}, [{"role": "user", "content": text}])
    assert rendered.encode("utf-16", "surrogatepass") == text.encode("utf-16", "surrogatepass")


def test_the_date_is_that_of_now():
    import datetime

    days = {f"{datetime.date.today():%d %b %Y}"}
    rendered = chat_model.render("{{ strftime_now('%d %b %Y') }}", {}, USER)
    assert rendered in days | {f"{datetime.date.today():%d %b %Y}"}
