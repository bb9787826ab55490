"""Faults of hostile or careless surroundings: secrets in texts, endless downloads, a cache that others may write.

Each test uses the real part: a server on loopback, files with owners and modes, pip, and MLflow's own page.
"""

import pytest

from slm import credentials

# ---------------------------------------------------------------------------------------------------------------------
# Secrets in texts

KEY = "c2VzYW1l/b3Blbg+sesame=="
SECRETS = {
    "a database password with a slash": ("postgresql://u:p/w@db/x", "postgresql://…@db/x"),
    "a database password with a slash after digits": (
        "mysql+pymysql://u:12/w@db:3306/x",
        "mysql+pymysql://…@db:3306/x",
    ),
    "a database password with a number sign": ("postgresql+psycopg://u:p#w@db/x", "postgresql+psycopg://…@db/x"),
    "a database password with a question mark": ("mssql://u:p?w=1@db/x", "mssql://…@db/x"),
    "a password with an at sign": ("https://u:p@w@host/x", "https://…@host/x"),
    "a password with a slash in any URL": ("https://u:p/w#x@host/x", "https://…@host/x"),
    "an Azure account key": (
        f"AccountName=me;AccountKey={KEY};EndpointSuffix=core.windows.net",
        "AccountName=me;AccountKey=…;EndpointSuffix=core.windows.net",
    ),
    "a Bearer header": ("Authorization: Bearer sesame", "Authorization: Bearer …"),
    "a Bearer token in a sentence": ("sent Bearer a1b2c3d4e5.f6, got 401.", "sent Bearer …, got 401."),
    "a Basic header": ("{'Authorization': 'Basic c2VzYW1lOm9wZW4='}", "{'Authorization': 'Basic …'}"),
    "a Basic header in a sentence": ("sent Basic c2VzYW1lOm9wZW4= in vain", "sent Basic … in vain"),
    "a password as a setting": ("host=db password=sesame user=me", "host=db password=… user=me"),
    "a password as a quoted setting": ("host=db password='open sesame' user=me", "host=db password=… user=me"),
    "a password in JSON": ('{"db_password": "sesame"}', '{"db_password": …}'),
    "an ODBC password at the start": ("Pwd=sesame;Uid=sa;", "Pwd=…;Uid=sa;"),
    "environment variables in a text": ("GITHUB_PAT=a DB_PASS=b MYSQL_PWD=c", "GITHUB_PAT=… DB_PASS=… MYSQL_PWD=…"),
    "a code in a query": ("https://f.example/api?code=sesame&x=1", "https://f.example/api?code=…&x=1"),
    "a token in a fragment": ("https://f.example/#access_token=sesame", "https://f.example/#access_token=…"),
    "a private key": (
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----…-----END RSA PRIVATE KEY-----",
    ),
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [pytest.param(*pair, id=what, marks=pytest.mark.fault(f"secrets: {what}")) for what, pair in SECRETS.items()],
)
def test_a_secret_in_a_text_is_left_out_and_the_rest_stays(text, shown):
    assert credentials.scrubbed(text) == shown
    assert credentials.scrubbed(shown) == shown and credentials.held_by(text)


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/me/mlflow.db",
        "sqlite:////home/me@work/mlflow.db",
        "postgresql://db:5432/mlflow",
        "postgresql://db/mlflow",
        "models:/phi3@champion",
        "models:/phi3@challenger,models:/phi3@champion",
        "http://127.0.0.1:5005/v1#phi3,models:/phi3@champion",
        "http://[::1]:5005/v1#phi3,models:/phi3@champion",
        "http://localhost/v1#phi3,models:/phi3@champion",
        "mlflow-artifacts:/1/0b5c/artifacts/set.jsonl",
        "mlflow-artifacts://host:5000/1/me@work/set.jsonl",
        "runs:/0b5c7c5d3f1e4b6f8a9d0e1f2a3b4c5d/prompts/set.jsonl",
        "s3://bucket/me@work/set.jsonl",
        "https://host:8080/path@v1/set.jsonl",
        "https://host/x?monkey=1&codes=2&sort_keys=3",
        "https://github.com/ORG/phi3-mlflow#subdir",
        "git@github.com:org/x.git",
        "microsoft/Phi-3-mini-4k-instruct",
        "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4",
        "3f786850e387550fdab836ed7e6dc881de23001b",
        "/home/me/prompts/passwords.jsonl",
        "my_scorers.py:polite,contains",
        '["<|end|>", "</s>", "Password:"]',
        "eos_token=</s> pad_token=<pad> max_tokens=16",
        "password=None, token=None",
        "PWD=/home/me OLDPWD=/",
        "The password is sesame.",
        "What is a secret: a thing that nobody knows?",
        "Basic arithmetic, Basic JavaScript and Basic English",
        "Bearer bonds, bearer tokens and Bearer authentication",
        "Authorization: required, or not",
        "the key=value pairs; pass=3, fail=2",
        "Mail me@example.org about http://example.org: it is down",
        "2026-11-22T03:00Z",
    ],
)
def test_a_harmless_text_stays_and_is_no_refused_parameter(text):
    assert credentials.scrubbed(text) == text
    assert not credentials.held_by(text)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.fault(f"secrets: the value of {name}"))
        for name in ("PGPASSWORD", "MYSQL_PWD", "DB_PASS", "GITHUB_PAT")
    ],
)
def test_the_value_of_a_secret_variable_is_left_out_wherever_it_stands(monkeypatch, name):
    monkeypatch.setenv(name, "open sesame!")
    assert credentials.scrubbed("login failed for open sesame! at db") == "login failed for … at db"
    assert credentials.scrubbed("GET /?q=open%20sesame%21") == "GET /?q=…"


@pytest.mark.fault("secrets: a variable's value that begins with a slash")
def test_a_variable_that_names_a_file_is_no_secret_and_a_slash_makes_no_path(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/sesame/0123456789")
    assert credentials.scrubbed("signed with /sesame/0123456789") == "signed with …"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(tmp_path))
    assert credentials.scrubbed(f"read {tmp_path}") == f"read {tmp_path}"


@pytest.mark.parametrize("text", ["x", "://a:", "a-", "bearer ", "?", "password", "authorization:", "-----BEGIN "])
def test_a_long_text_takes_little_processor_time(text):
    import time

    start = time.process_time()
    credentials.scrubbed(text * (100_000 // len(text)))
    assert time.process_time() - start < 20  # a quadratic search takes minutes
