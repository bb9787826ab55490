"""API keys in a file: changed while the server runs, removed, empty, and wrong at the start."""

import openai
import pytest
from support.openai_servers import ask, here

from slm.base.errors import BadInput
from slm.serving.keys import Keys


def write(file, text: str) -> None:
    """As editors and secret mounts do: another file takes the place."""
    (file.parent / "new").write_text(text)
    (file.parent / "new").replace(file)


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "keys", "first\nsecond\n")
    return tmp_path / "keys"


def opens(keys: Keys, *given: str) -> list[bool]:
    return [keys.tenant(f"Bearer {key}") is not None for key in given]


def test_keys_are_those_of_the_file_at_each_request(file):
    keys = Keys(file=str(file))
    assert opens(keys, "first", "second", "third", "") == [True, True, False, False]
    assert keys.tenant("Bearer first") == keys.tenant("bearer first") != keys.tenant("Bearer second")
    before = keys.tenant("Bearer second")
    write(file, "second,third")
    assert opens(keys, "first", "second", "third") == [False, True, True]
    assert keys.tenant("Bearer second") == before  # not by its place: the key's prompts stay the key's
    assert keys.several and keys and keys.tenant("Basic second") is None


@pytest.mark.fault("serving: the key file is removed")
@pytest.mark.parametrize("change", ["remove", "empty", "binary", "folder"])
def test_a_file_that_cannot_be_read_leaves_the_keys_of_before(file, capsys, change):
    keys = Keys(file=str(file))
    file.unlink()
    if change == "empty":
        write(file, " , \n")
    elif change == "binary":
        file.write_bytes(b"\xff\xfe")
    elif change == "folder":
        file.mkdir()
    assert opens(keys, "first", "third", "first") == [True, False, True]
    err = capsys.readouterr().err
    assert err.startswith("warning: PHI3_MLFLOW_API_KEY_FILE: ") and err.endswith("; the keys of before stay\n")
    assert err.count("\n") == 1 and str(file) in err
    file.rmdir() if change == "folder" else file.unlink(missing_ok=True)
    write(file, "third")
    assert opens(keys, "first", "third") == [False, True]


@pytest.mark.parametrize(
    ("text", "content", "told"),
    [
        ("one", "two", "PHI3_MLFLOW_API_KEY, PHI3_MLFLOW_API_KEY_FILE: are both set; unset one of them"),
        ("", "\n", "keys: holds no key; write one"),
        ("", None, "keys: No such file or directory"),
    ],
)
def test_a_wrong_file_is_one_line_at_the_start(tmp_path, text, content, told):
    if content is not None:
        (tmp_path / "keys").write_text(content)
    with pytest.raises(BadInput, match=told):
        Keys(text, str(tmp_path / "keys"))


def test_no_variable_leaves_the_server_open():
    keys = Keys()
    assert not keys and not keys.several and keys.tenant("") == keys.tenant("Bearer x") == ""


def test_a_server_takes_a_key_that_was_added_under_way(models, file):
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)

    with here(models["onnx int4"].unwrap_python_model(), key_file=str(file)) as (address, _):
        assert ask(client("first"), max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError):
            ask(client("third"), max_tokens=1)
        write(file, "third")
        assert ask(client("third"), max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError):
            ask(client("first"), max_tokens=1)
