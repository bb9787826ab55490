"""The answers of prompts that can be computed, from the words of the prompt alone.

A rule is a pattern and a function of its groups. The pattern reads the conversation: the contents of all messages, one
per line. Groups that are numbers arrive as fractions. No rule reads a row's `expected` or `scorers`.
"""

import calendar
import contextlib
import io
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable
from datetime import date, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from string import ascii_uppercase

DAYS, MONTHS = [*calendar.day_name], [*calendar.month_name][1:]
METRIC = {"kilo": Fraction(1000), "centi": Fraction(1, 100), "milli": Fraction(1, 1000), "": Fraction(1)}
WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "twenty": 20, "forty": 40}
TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
ROMAN = {"XL": 40, "X": 10, "IX": 9, "V": 5, "IV": 4, "I": 1}
COMPASS = ["north", "east", "south", "west"]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def numbers(text: str) -> list[Fraction]:
    return [Fraction(number) for number in NUMBER.findall(text)]


def words(text: str) -> list[str]:
    return re.findall(r"[\w'\u2019-]+", text)


def calculated(text: str) -> Fraction:
    """The value of an expression of whole and decimal numbers with + - * / and brackets."""
    text = text.strip().replace(" times ", " * ").replace(" squared", " ** 2").replace(" cubed", " ** 3")
    text = text.replace("^", "**").replace("to the power of", "**")
    assert re.fullmatch(r"[\d\s.+*/()-]+", text), text
    return eval(re.sub(r"\d+(?:\.\d+)?", lambda number: f"Fraction('{number[0]}')", text), {"Fraction": Fraction})


def solved(equation: str, letter: str = "x", start: int = -1000) -> Fraction:
    """The whole number from `start` on that makes both sides of an equation equal."""
    text = re.sub(rf"(\d)\s*(?=[{letter}(])", r"\1 * ", equation)
    left, right = text.split("=")
    sides = (lambda value, side=side: calculated(side.replace(letter, f"({value})")) for side in (left, right))
    one, other = sides
    return next(Fraction(value) for value in range(start, 1001) if one(value) == other(value))


def ratio(value: Fraction) -> str:
    return f"{value.numerator}/{value.denominator}"


def printed(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue().strip()


def rounded(value: Fraction, unit: str) -> str:
    return (
        f"{(Decimal(value.numerator) / value.denominator / Decimal(unit)).quantize(0, ROUND_HALF_UP) * Decimal(unit)}"
    )


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def roman(number: int) -> str:
    if not number:
        return ""
    sign, value = next((sign, value) for sign, value in ROMAN.items() if value <= number)
    return sign + roman(number - value)


def yes(value: bool) -> str:
    return "yes" if value else "no"


def fields(text: str) -> dict[str, object]:
    """{"a": 1} of `"a" set to 1`: each key with its value, a JSON text or one of the words that JSON has."""
    pairs = re.findall(r'key "(\w+)" set to (?:the number )?("[^"]*"|[\d.]+|null|true|false)', text)
    return {key: json.loads(value) for key, value in pairs}


def option(text: str, right: Callable[[str], bool]) -> str:
    """The letter of the only option that is right."""
    [letter] = [letter for letter, words in re.findall(r"^([A-D])\) (.+)$", text, re.MULTILINE) if right(words)]
    return letter


def chained(text: str, more: str, first: bool) -> str:
    """Of "A is taller than B. B is taller than C.", the name that is first, or last."""
    pairs = re.findall(rf"(\w+)(?: box)? is {more} than (?:the )?(\w+)", text)
    names = {name for pair in pairs for name in pair}
    [name] = names - {pair[first] for pair in pairs}
    return name


def clock(text: str) -> datetime:
    return datetime.strptime(text, "%H:%M")


def step(names: list[str], name: str, by: int) -> str:
    return names[(names.index(name) + by) % len(names)]


def csv_objects(text: str) -> list[dict[str, object]]:
    head, *rows = (line.split(",") for line in text.strip().splitlines())
    return [{key: int(v) if v.isdigit() else v for key, v in zip(head, row, strict=True)} for row in rows]


def climbed(depth: Fraction, up: Fraction, down: Fraction) -> int:
    at = Fraction(0)
    for day in itertools.count(1):
        at += up
        if at >= depth:
            return day
        at -= down
    raise AssertionError


def oldest_first(text: str) -> str:
    ages = {name: int(age) for name, age in re.findall(r"(\w+) is (\d+)", text)}
    return ", ".join(sorted(ages, key=lambda name: -ages[name]))


def days_of(month: str) -> int:
    return calendar.monthrange(2023, MONTHS.index(month) + 1)[1]


def following(sequence: list[Fraction]) -> Fraction:
    """What comes next: one step, one factor, or steps that grow by one number."""
    steps = [b - a for a, b in itertools.pairwise(sequence)]
    if len({b / a for a, b in itertools.pairwise(sequence)}) == 1:
        return sequence[-1] * sequence[1] / sequence[0]
    [change] = {b - a for a, b in itertools.pairwise(steps)}
    return sequence[-1] + steps[-1] + change


def in_words(number: int) -> str:
    tens, ones = divmod(number, 10)
    names = {value: name for name, value in (WORDS | TENS).items()}
    return f"{names[tens * 10]}-{names[ones]}"


def shortest_first(text: str) -> list[str]:
    return sorted(re.split(r", | or ", text), key=len)


def unique_between(options: str, wanted: Callable[[Fraction], bool]) -> Fraction:
    [found] = [value for value in numbers(options) if wanted(value)]
    return found


def fitting(check: Callable[[int], bool], below: int = 1001) -> int:
    return next(value for value in range(below) if check(value))


RULES: list[tuple[str, Callable]] = [
    # sums
    (r"^What is (\(?-?[\d.]+(?: ?[-+*/] \(?-?[\d.]+\)?)+)\?(?: Answer.*)?\Z", calculated),
    (r"^What is (\d+ times \d+)\? Answer", calculated),
    (r"^What is (\d+ (?:squared|cubed|to the power of \d+))\?", calculated),
    (r"nothing else\.\n([\d /+]+)\Z", calculated),
    (r"\n(\d+)\nSubtract (\d+) from that", lambda total, less: total - less),
    (r"\n(\d+)\nMultiply that by (\d+)", lambda a, b: a * b),
    (r"\n(\d+)\nNow add (\d+) to that", lambda a, b: a + b),
    (r"\n(\d+)\nAnd half of that", lambda a: a / 2),
    (r"^Add (.*)\. Answer", lambda text: sum(numbers(text))),
    (r"remainder when (\d+) is divided by (\d+)", lambda a, b: a % b),
    (r"^What is half of (\d+)\? Answer", lambda a: a / 2),
    (r"^What is double (\d+)", lambda a: a * 2),
    (r"^What is (\d+) factorial", lambda a: math.factorial(int(a))),
    (r"greatest common divisor of (\d+) and (\d+)", lambda a, b: math.gcd(int(a), int(b))),
    (r"least common multiple of (\d+) and (\d+)", lambda a, b: math.lcm(int(a), int(b))),
    (r"What is the average of (.*)\?", lambda text: statistics.mean(numbers(text))),
    (r"What is the median of (.*)\?", lambda text: statistics.median(numbers(text))),
    (r"^Round ([\d.]+) to one decimal place", lambda a: rounded(a, "0.1")),
    (r"^Round (\d+) to the nearest hundred", lambda a: rounded(a, "100")),
    (r"sum of the digits of (\d+)", lambda a: sum(map(int, str(a)))),
    (r"sum of all whole numbers from (\d+) to (\d+)", lambda a, b: sum(range(int(a), int(b) + 1))),
    (r"binary number (\d+) as a decimal", lambda a: int(str(a), 2)),
    (r"hexadecimal number (\w+) as a decimal", lambda a: int(str(a), 16)),
    (r"Roman numeral ([XVI]+)", lambda text: fitting(lambda value: roman(value) == text)),
    (r"number (\d+) as a Roman numeral", lambda a: roman(int(a))),
    (r"square root of (\d+)", lambda a: math.isqrt(int(a))),
    (r"logarithm of (\d+) to base (\d+)", lambda a, base: fitting(lambda power: base**power == a)),
    (r"^Write (\d+ to the power of \d+) without", calculated),
    (r"^Write ([\d.]+ \* \d+\^\d+) without", calculated),
    (r"^Write the number \"two hundred and (\w+)\" in digits", lambda word: 200 + WORDS[word]),
    (r"number (\d+) in words", lambda a: in_words(int(a))),
    (r"digit is in the hundreds place of (\d+)", lambda a: str(a)[-3]),
    (r"number is larger, ([\d.]+) or ([\d.]+)\?", max),
    (r"fraction is larger, (\S+) or (\S+)\?", lambda a, b: max(a, b, key=Fraction)),
    # fractions and percentages
    (r"^What is (\S+ [-+] \S+) as a fraction", lambda text: ratio(calculated(text))),
    (r"^What is (\S+) times (\S+) as a fraction", lambda a, b: ratio(Fraction(a) * Fraction(b))),
    (r"fraction (\S+) in its lowest terms", lambda text: ratio(Fraction(text))),
    (r"^What is (\d+/\d+) of (\d+)", lambda a, b: Fraction(a) * b),
    (r"^Write (\d+/\d+) as a decimal number", Fraction),
    (r"^Write ([\d.]+) as a percentage", lambda a: a * 100),
    (r"^What is (\d+)% of (\d+)\? Answer with the number", lambda a, b: a * b / 100),
    (r"^(\d+) is what percentage of (\d+)\?", lambda a, b: rounded(a * 100 / b, "0.1")),
    (r"^(\d+) is (\d+)% of which number", lambda a, percent: a * 100 / percent),
    (r"price rises from (\d+) dollars to (\d+)", lambda a, b: (b - a) * 100 / a),
    (r"costs (\d+) dollars\. In the sale it is (\d+)% cheaper", lambda a, b: a * (100 - b) / 100),
    (r"meal costs (\d+) dollars\. Mia adds a tip of (\d+)%", lambda a, b: a * (100 + b) / 100),
    (r"puts (\d+) dollars .* with (\d+)% simple interest per year.*after (\d+) y", lambda a, b, n: a * b / 100 * n),
    (r"jacket costs (\d+) dollars.* by (\d+)%.* by (\d+)%", lambda a, b, c: a * (100 - b) * (100 - c) / 10000),
    # equations
    (r"What is ([\dx+ ]+) when x = (\d+)\?", lambda text, x: calculated(text.replace("x", f" * {x}"))),
    (r"^Solve (.*) for x", solved),
    (r"positive number x solves x\^2 = (\d+)", lambda a: fitting(lambda x: x > 0 and x**2 == a)),
    (r"^x \+ y = (\d+) and x - y = (\d+)\.", lambda a, b: fitting(lambda x: x - (a - x) == b)),
    (r"I think of a number, double it and add (\d+)\. The result is (\d+)", lambda a, b: solved(f"2x + {a} = {b}")),
    # primes, chances, ways
    (r"smallest prime number greater than (\d+)", lambda a: fitting(lambda x: x > a and is_prime(x))),
    (r"prime numbers are there from 1 to (\d+)", lambda a: sum(map(is_prime, range(1, int(a) + 1)))),
    (r"numbers 1 to (\d+) is rolled.* greater than (\d+)", lambda n, a: ratio(Fraction(int(n - a), int(n)))),
    (r"bag holds (\d+) red and (\d+) blue", lambda red, blue: ratio(red / (red + blue))),
    (r"has (\d+) shirts and (\d+) skirts", lambda a, b: len([*itertools.product(range(int(a)), range(int(b)))])),
    (r"Each of (\d+) people shakes hands", lambda a: len([*itertools.combinations(range(int(a)), 2)])),
    # shapes
    (r"(\d+) metres long and (\d+) metres wide\. What is its area", lambda a, b: a * b),
    (r"side of a square is (\d+) .*perimeter", lambda a: 4 * a),
    (r"base of (\d+) .*height of (\d+) .*area", lambda a, b: a * b / 2),
    (r"(\d+) metres long, (\d+) metres wide and (\d+) metres high", lambda a, b, c: a * b * c),
    (r"angles of a triangle measure (\d+) and (\d+)", lambda a, b: 180 - a - b),
    (r"legs of (\d+) and (\d+) centimetres", lambda a, b: math.isqrt(int(a * a + b * b))),
    # word problems
    (r"has (\d+) apples and buys (\d+) more", lambda a, b: a + b),
    (r"has (\d+) shells and finds (\d+) more", lambda a, b: a + b),
    (r"packs of (\d+)\. Nora buys (\d+) packs and gives away (\d+)", lambda a, b, c: a * b - c),
    (r"Each of her brothers has exactly (\w+) sister", lambda word: WORDS[word]),
    (r"box holds (\d+) eggs.* in (\d+) full boxes", lambda a, b: a * b),
    (r"had (\d+) stickers\. She gave (\d+) .* and (\d+) to", lambda a, b, c: a - b - c),
    (r"at (\d+) kilometres per hour for (\d+) hours", lambda a, b: a * b),
    (r"notebook costs (\d+) .* pen costs (\d+) .* do (\d+) notebooks and (\d+) pens", lambda a, b, c, d: a * c + b * d),
    (r"\n(\d+)\nAt the next stop (\d+) people get on", lambda a, b: a + b),
    (r"drives (\d+) kilometres in (\d+) hours", lambda a, b: a / b),
    (r"cycles at (\d+) kilometres per hour.* for (\d+) kilometres", lambda a, b: b / a * 60),
    (r"book for ([\d.]+) dollars and pays with a (\d+) dollar note", lambda a, b: b - a),
    (r"in the ratio (\d+) to (\d+)\. .* with (\d+) litres", lambda a, b, c: c / a * b),
    (r"is (\d+) years old\. Her brother is half as old", lambda a: a / 2),
    (r"In (\d+) years Leo will be (\d+)", lambda a, b: b - a),
    (
        r"If (\d+) machines make (\d+) toys in (\d+) .* do (\d+) .* make (\d+)",
        lambda a, b, c, d, e: e / (d * b / a / c),
    ),
    (r"cost (\d+) cents together\. The bat costs (\d+) cents more", lambda a, b: solved(f"x + x + {b} = {a}")),
    (r"it is (-\d+) degrees\. .* rises by (\d+)", lambda a, b: a + b),
    (r"(\d+) metres long\. A post stands every (\d+) metres", lambda a, b: len(range(0, int(a) + 1, int(b)))),
    (r"reads (\d+) pages a day.* in (\d+) days", lambda a, b: a * b),
    (r"bus holds (\d+) people\. How many buses do (\d+)", lambda a, b: math.ceil(b / a)),
    (r"Three children share (\d+) sweets", lambda a: a / WORDS["three"]),
    (r"well that is (\d+) metres deep\. Each day it climbs (\d+) .* back (\d+)", climbed),
    (r"Six pens cost (\d+) dollars", lambda a: a / WORDS["six"]),
    (r"farm has (\d+) cows and (\d+) hens\. How many legs", lambda a, b: 4 * a + 2 * b),
    (r"cents are (\d+) coins of (\d+) cents and (\d+) coins of (\d+)", lambda a, b, c, d: a * b + c * d),
    (r"All but (\d+) of the (\d+) sheep", lambda left, _: left),
    # units and time
    (r"How many minutes are in one hour", lambda: timedelta(hours=1) // timedelta(minutes=1)),
    (r"How many days are in (\w+) weeks?", lambda a: timedelta(weeks=int(WORDS.get(a, a))).days),
    (r"How many minutes are two and a half hours", lambda: timedelta(hours=2.5) // timedelta(minutes=1)),
    (r"How many seconds are in (\d+) hours", lambda a: timedelta(hours=int(a)) // timedelta(seconds=1)),
    (r"How many centimetres are (\d+) inches", lambda a: a * Fraction("2.54")),
    (r"How many (\w*?)(?:metre|gram)s are ([\d.]+) (\w*?)(?:metre|gram)s", lambda a, n, b: n * METRIC[b] / METRIC[a]),
    (r"Convert (\d+) degrees Fahrenheit", lambda a: (a - 32) * 5 / 9),
    (r"eggs are in (\d+) dozen", lambda a: a * 12),
    (r"opens at (\S+) and closes at (\S+)\.", lambda a, b: (clock(b) - clock(a)) / timedelta(hours=1)),
    (r"starts at (\S+) and ends at (\S+)\. How", lambda a, b: (clock(b) - clock(a)) / timedelta(minutes=1)),
    (r"leaves at (\S+)\. The journey takes (\d+)", lambda a, b: f"{clock(a) + timedelta(minutes=int(b)):%H:%M}"),
    (r"How many days after (\d+) May is (\d+) May", lambda a, b: (date(2001, 5, int(b)) - date(2001, 5, int(a))).days),
    (r"How many days does a leap year have", lambda: (date(2025, 1, 1) - date(2024, 1, 1)).days),
    (r"year (\d+) a leap year", lambda a: yes(calendar.isleap(int(a)))),
    (r"day of the week comes directly after (\w+)\?", lambda day: step(DAYS, day, 1)),
    (r"Today is (\w+)\. Which day of the week is it in (\d+)", lambda day, by: step(DAYS, day, int(by))),
    (r"If tomorrow is (\w+), which day of the week was yesterday", lambda day: step(DAYS, day, -2)),
    (r"Which month comes directly before (\w+)", lambda month: step(MONTHS, month, -1)),
    (r"Which month comes (\d+) months after (\w+)", lambda by, month: step(MONTHS, month, int(by))),
    (r"Which month of the year is the shortest", lambda: min(MONTHS, key=lambda m: days_of(m))),
    (r"You face (\w+) and turn right by 90", lambda way: step(COMPASS, way, 1)),
    (r"You face (\w+)\. You turn left by 90 degrees, and then left by 90", lambda way: step(COMPASS, way, -2)),
    (r"Which month has 31 days\?\n((?:.|\n)*)", lambda text: option(text, lambda month: days_of(month) == 31)),
    # dates and forms
    (
        r"Rewrite the date (\d+ \w+ \d+) in the form YYYY-MM-DD",
        lambda t: f"{datetime.strptime(t, '%d %B %Y'):%Y-%m-%d}",
    ),
    (
        r" on (\d+ \w+ \d+)\.\" Write the date in the form YYYY",
        lambda t: f"{datetime.strptime(t, '%d %B %Y'):%Y-%m-%d}",
    ),
    (r"Write the date (\d+ \w+ \d+) in the form DD/MM/YYYY", lambda t: f"{datetime.strptime(t, '%d %B %Y'):%d/%m/%Y}"),
    (r"Write the date (\S+) as the day, the English name", lambda t: f"{date.fromisoformat(t):%d %B %Y}".lstrip("0")),
    (r"time (\d+:\d+ pm) in the 24-hour form", lambda t: f"{datetime.strptime(t, '%I:%M %p'):%H:%M}"),
    (r"date is earlier: (\S+) or (\S+)\?", lambda a, b: min(a, b, key=date.fromisoformat)),
    (r"number (\d+) with leading zeros, so that it has (\w+) digits", lambda a, n: f"{int(a):0{WORDS[n]}}"),
    (r"number (\d+) with commas between the thousands", lambda a: f"{int(a):,}"),
    (r"number ([\d.]+) with exactly two decimal places", lambda a: f"{float(a):.2f}"),
    # order
    (r"numbers from smallest to largest.*: ([\d, ]+)", lambda t: ", ".join(map(str, sorted(numbers(t))))),
    (r"numbers from largest to smallest.*: ([\d, ]+)\.", lambda t: ", ".join(map(str, sorted(numbers(t))[::-1]))),
    (r"Which number is the largest: (.*)\?", lambda text: max(numbers(text))),
    (r"numbers is closest to (\d+): (.*)\?", lambda a, text: min(numbers(text), key=lambda x: abs(x - a))),
    (r"because it is odd: (.*)\?", lambda text: unique_between(text, lambda x: x % 2 == 1)),
    (r"Dan stands directly behind (\w+), and Fay stands directly behind (\w+)\.", lambda front, middle: middle),
    (r"Sort these words alphabetically.*: (.*)", lambda text: ", ".join(sorted(words(text)))),
    (r"words comes first in a dictionary: (.*)\?", lambda text: min(words(text))),
    (r"words has the fewest letters: (.*)\?", lambda text: min(words(text), key=len)),
    (r"words has the most letters: (.*)\?", lambda text: max(words(text), key=len)),
    (r"words from shortest to longest.*: (.*)", lambda text: ", ".join(shortest_first(text))),
    (r"^(.*) years old\. List the three names from oldest to youngest", oldest_first),
    (r"(.*is taller than.*) Who is the tallest", lambda text: chained(text, "taller", True)),
    (r"(.*is heavier than.*) Which box is the lightest", lambda text: chained(text, "heavier", False)),
    (r"comes next: ([\d, ]+)\? Answer", lambda text: following(numbers(text))),
    (r"two numbers before it: ([\d, ]+)\. Which", lambda text: sum(numbers(text)[-2:])),
    (r"letter comes next: ([A-Z, ]+)\?", lambda text: chr(int(following([Fraction(ord(x)) for x in words(text)])))),
    # letters and words
    (r"How many letters are in the word \"(\w+)\"", len),
    (r"first letter of the word \"(\w+)\"", lambda word: word[0]),
    (r"last letter of the word \"(\w+)\"", lambda word: word[-1]),
    (r"fourth letter of the word \"(\w+)\"", lambda word: word[3]),
    (r"letter (\w) occur in the word \"(\w+)\"", lambda letter, word: word.lower().count(letter)),
    (r"vowels \(a, e, i, o, u\) are in the word \"(\w+)\"", lambda word: sum(x in "aeiou" for x in word)),
    (r"How many words are in the sentence \"(.*)\"", lambda text: len(words(text))),
    (r"third word of the sentence \"(.*)\"", lambda text: words(text)[2]),
    (r"last word of the sentence \"(.*)\"", lambda text: words(text)[-1]),
    (r"Write the word \"(\w+)\" backwards", lambda word: word[::-1]),
    (r"Write the word \"(\w+)\" without the letter (\w)\.", lambda word, letter: word.replace(letter, "")),
    (r"Replace every letter (\w) in \"(\w+)\" by the letter (\w)", lambda a, word, b: word.replace(a, b)),
    (r"Is the word \"(\w+)\" the same when it is written backwards", lambda word: yes(word == word[::-1])),
    (r"words \"(\w+)\" and \"(\w+)\" have exactly the same letters", lambda a, b: yes(sorted(a) == sorted(b))),
    (r"letter of the alphabet comes directly after (\w)\?", lambda x: step([*ascii_uppercase], x, 1)),
    (r"letter of the alphabet comes directly before (\w)\?", lambda x: step([*ascii_uppercase], x, -1)),
    (r"position in the alphabet is the letter (\w),", lambda x: ascii_uppercase.index(x) + 1),
    (r"first letters of the words \"(.*)\"", lambda text: "".join(word[0] for word in words(text))),
    (r"Spell the word \"(\w+)\" letter by letter.* hyphen", "-".join),
    (r"the word \"(\w+)\" in capital letters", str.upper),
    (r"Write \"(.*)\" with a capital letter at the start of each word", str.title),
    (r"Write \"(.*)\" in snake_case", lambda text: "_".join(words(text))),
    (r"Write \"(.*)\" in camelCase", lambda text: text[0] + "".join(words(text.title()))[1:]),
    (r"Which part of (\S+) comes after the @ sign", lambda text: text.split("@")[1]),
    # code
    (r"(?s)^What does this Python code print\? Reply with the output only\.\n\n(.*)\Z", printed),
    (
        r"(?s)^What does .* print\?\n\n(.*?)\nprint.*next line is (print\(.*\))\. What",
        lambda a, b: printed(f"{a}\n{b}"),
    ),
    # yes or no
    (r"Is (\d+) smaller than (\d+)\?", lambda a, b: yes(a < b)),
    (r"Is (\d+) a prime number", lambda a: yes(is_prime(int(a)))),
    (r"Is (\d+) divisible by (\d+)", lambda a, b: yes(a % b == 0)),
    (r"Is (\d/\d) greater than (\d/\d)", lambda a, b: yes(Fraction(a) > Fraction(b))),
    (r"Is the number (\d+) even or odd", lambda a: "odd" if a % 2 else "even"),
    (r"Is the letter (\w) a vowel or a consonant", lambda x: "vowel" if x in "AEIOU" else "consonant"),
    # choices
    (
        r"(?s)Which number comes next: ([\d, ]+)\?\n(.*)",
        lambda t, more: option(more, lambda w: Fraction(w) == following(numbers(t))),
    ),
    (
        r"(?s)numbers is the largest\?\n(.*)",
        lambda t: option(t, lambda w: Fraction(w) == max(map(Fraction, re.findall(r"\) (\S+)", t)))),
    ),
    (r"(?s)these numbers is prime\?\n(.*)", lambda t: option(t, lambda w: is_prime(int(w)))),
    (r"(?s)numbers is a multiple of (\d+)\?\n(.*)", lambda a, t: option(t, lambda w: Fraction(w) % a == 0)),
    (r"(?s)^What is (\d+ \* \d+)\?\n(A.*)", lambda a, t: option(t, lambda w: Fraction(w) == calculated(a))),
    (r"(?s)^What is (\d+)% of (\d+)\?\n(.*)", lambda a, b, t: option(t, lambda w: Fraction(w) == a * b / 100)),
    (r"(?s)fractions equals (\d/\d)\?\n(.*)", lambda a, t: option(t, lambda w: Fraction(w) == Fraction(a))),
    # lines of text
    (r"^Count down from (\d+) to (\d+)\.", lambda a, b: " ".join(map(str, range(int(a), int(b) - 1, -1)))),
    (r"even numbers from (\d+) to (\d+) on one line", lambda a, b: ", ".join(map(str, range(int(a), int(b) + 1, 2)))),
    (r"words (\w+), (\w+) and (\w+) in this order, joined by hyphens", lambda *a: "-".join(a)),
    (r"words (\w+), (\w+) and (\w+) in this order, separated by semicolons", lambda *a: "; ".join(a)),
    (r"words (\w+), (\w+) and (\w+) on three separate lines", lambda *a: "\n".join(a)),
    (r"letters (\w), (\w) and (\w) on one line with the character (\S) between", lambda a, b, c, d: d.join((a, b, c))),
    (r"word \"(\w+)\" three times on one line, separated by spaces", lambda word: " ".join([word] * 3)),
    (r"exactly (\w+) asterisks", lambda word: "*" * WORDS[word]),
    (r"first (\w+) letters of the alphabet in capitals", lambda word: ascii_uppercase[: WORDS[word]]),
    # JSON
    (r"Write a JSON object with the (key .* set to .*?)\.(?: Reply.*)?\Z", lambda text: json.dumps(fields(text))),
    (r"JSON array with the even numbers from (\d+) to (\d+)", lambda a, b: json.dumps([*range(int(a), int(b) + 1, 2)])),
    (r"JSON array with the strings (.*), in this order", lambda text: json.dumps(re.findall(r'"(\w+)"', text))),
    (
        r"JSON array with the whole numbers from (\d+) down to (\d+)",
        lambda a, b: json.dumps([*range(int(a), int(b) - 1, -1)]),
    ),
    (r"only the odd numbers of this list.*: (.*)\. Reply", lambda t: json.dumps([int(x) for x in numbers(t) if x % 2])),
    (r"(?s)^(.*)\n\nTurn this CSV into a JSON array", lambda text: json.dumps(csv_objects(text))),
    (
        r"words (.*) to its number of letters",
        lambda t: json.dumps({word: len(word) for word in re.findall(r'"(\w+)"', t)}),
    ),
    (
        r"the numbers (.*) in this order\..*its square",
        lambda t: json.dumps([{"n": int(x), "square": int(x * x)} for x in numbers(t)]),
    ),
    # tables and texts with numbers
    (r"(?s)^(name,age\n.*)\n\nHow old is (\w+)", lambda t, name: {x["name"]: x["age"] for x in csv_objects(t)}[name]),
    (
        r"(?s)\| fruit \| kg \|(.*)\n\nHow many kilograms of (\w+)",
        lambda t, a: dict(re.findall(r"\| (\w+) \| (\d+) \|", t))[a],
    ),
    (r"invoice of (\d+) euros .* received (\d+) euros(?s:.*) still have to pay", lambda a, b: a - b),
    (
        r"twelve players\. (\w+) of .*, (\w+) play .*\n\nHow many players play drums",
        lambda a, b: 12 - WORDS[a.lower()] - WORDS[b],
    ),
    (r"After an hour .* after (\w+) more hours .* it takes one hour\.\n\nHow many hours", lambda a: 1 + WORDS[a] + 1),
    (r"sold (\d+) bicycles, and in its second year it sold twice as many(?s:.*) in its second year\?", lambda a: a * 2),
    (r"(.*) What is the highest temperature", lambda text: max(numbers(text))),
]


def found(conversation: list[str]) -> list[str]:
    """The answers of all rules whose pattern is in the conversation: none or one, if the rules are in order."""
    text, answers = "\n".join(conversation), []
    for pattern, rule in RULES:
        if match := re.search(pattern, text):
            given = [Fraction(group) if NUMBER.fullmatch(group) else group for group in match.groups()]
            answers.append(written(rule(*given)))
    return answers


def written(value: object) -> str:
    if isinstance(value, Fraction) and value.denominator == 1:
        return str(value.numerator)
    return str(float(value)) if isinstance(value, Fraction) else str(value)
