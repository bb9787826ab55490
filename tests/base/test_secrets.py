"""Secrets in texts, parameters and the environment: what is shown leaves them out."""

import time

import pytest
from support.commands import entry_point, in_process
from support.planted_secrets import HF, PLANTED, assert_none_in

from slm.base import credentials

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
    "a password as YAML has it": ("user: me\npassword: sesame1!\n", "user: me\npassword: …\n"),
    "a key as a configuration file has it": ("aws_secret_access_key = ab/c+d1", "aws_secret_access_key = …"),
    "a password as an option": ("psql --password=sesame -U me", "psql --password=… -U me"),
    "a token as an option": ("curl --token sesame -v", "curl --token … -v"),
    "a key in a header of its own": ("X-Api-Key: sesame-1", "X-Api-Key: …"),
    "a temporary key of AWS": (f"id ASIA{'A1' * 8}", "id …"),
    "a token of Vault": (f"hvs.{'aB3' * 8}", "…"),
    "a token of Google": (f"ya29.{'aB3' * 8}", "…"),
    "a token of Docker": (f"dckr_pat_{'aB3' * 8}", "…"),
    "a token of NVIDIA": (f"nvapi-{'aB3' * 8}", "…"),
    "a webhook of Slack": (
        f"https://hooks.slack.com/services/T{'A1' * 5}/B{'A1' * 5}/{'aB3' * 8}",
        "https://hooks.slack.com/services/…",
    ),
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
        for name in ("PGPASSWORD", "MYSQL_PWD", "DB_PASS", "GITHUB_PAT", "LDAP_BINDPW", "REDIS_AUTH", "SMTPPASS")
    ],
)
def test_the_value_of_a_secret_variable_is_left_out_wherever_it_stands(monkeypatch, name):
    monkeypatch.setenv(name, "open sesame!")
    assert credentials.scrubbed("login failed for open sesame! at db") == "login failed for … at db"
    assert credentials.scrubbed("GET /?q=open%20sesame%21") == "GET /?q=…"


@pytest.mark.fault("secrets: the password in a variable that is a URL")
def test_the_password_of_a_url_in_the_environment_is_left_out_by_itself(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:open-sesame@db/x")
    assert credentials.scrubbed("login with open-sesame failed") == "login with … failed"


@pytest.mark.fault("secrets: a variable's value that begins with a slash")
def test_a_variable_that_names_a_file_is_no_secret_and_a_slash_makes_no_path(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/sesame/0123456789")
    assert credentials.scrubbed("signed with /sesame/0123456789") == "signed with …"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(tmp_path))
    assert credentials.scrubbed(f"read {tmp_path}") == f"read {tmp_path}"


@pytest.mark.parametrize("text", ["x", "://a:", "a-", "bearer ", "?", "password", "authorization:", "-----BEGIN "])
def test_a_long_text_takes_little_processor_time(text):

    start = time.process_time()
    credentials.scrubbed(text * (100_000 // len(text)))
    assert time.process_time() - start < 20  # a quadratic search takes minutes


@pytest.mark.fault("security: a token in -P, in a URL or as a word")
@pytest.mark.parametrize(
    "option",
    [
        "--prompts=https://me:sesame-in-a-url@host/p.jsonl",
        "--prompts=https://host/p.jsonl?X-Amz-Signature=sesame-in-a-url",
        "--model_uris=http://sesame-in-a-url@127.0.0.1:1/v1",
        "--judge=http://me:sesame-in-a-url@127.0.0.1:1/v1#m",
        f"--model={HF}",
        f"--stop={PLANTED['AWS_SECRET_ACCESS_KEY']}",
        "--foo=https://me:sesame-in-a-url@host",
    ],
)
def test_a_parameter_with_a_secret_is_refused_without_repeating_it(tmp_path, option):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    done = in_process("evaluate", option, MLFLOW_TRACKING_URI=uri, **PLANTED)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert_none_in(done.out + done.err)
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.fault("security: a password in the tracking URI")
def test_a_password_in_the_tracking_uri_is_not_shown():
    done = entry_point("evaluate", MLFLOW_TRACKING_URI="http://me:sesame-in-a-url@127.0.0.1:1")
    assert done.code == 4
    assert_none_in(done.out + done.err)


@pytest.mark.fault("security: a hub id in a scheduled run")
def test_a_scheduled_run_takes_no_hub_id_and_so_no_moving_revision():
    done = in_process("evaluate", "--slot=2026-01-01T00:00", "--model=microsoft/Phi-3-mini-4k-instruct")
    assert done.code == 2
    assert done.err.startswith("error: slot: needs model_uris") and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/x", "https://…@host/x"),
        ("git+https://token@host/x and postgresql://u:p%40@db/x", "git+https://…@host/x and postgresql://…@db/x"),
        ("https://host/x?a=1&token=abc&sig=d#e", "https://host/x?a=1&token=…&sig=…#e"),
        (f"Bearer {HF}.", "Bearer …."),
        ("models:/phi3@champion", "models:/phi3@champion"),
        ("git@github.com:org/x.git", "git@github.com:org/x.git"),
        ("http://127.0.0.1:5005/v1#phi3", "http://127.0.0.1:5005/v1#phi3"),
        ("https://host/x?monkey=1", "https://host/x?monkey=1"),
    ],
)
def test_secrets_are_left_out_and_nothing_else(text, shown):
    assert credentials.scrubbed(text) == shown
    assert credentials.held_by(text) == (text != shown)
