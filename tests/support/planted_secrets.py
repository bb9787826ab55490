"""One secret of each kind. A test plants them, and searches what is left behind."""

HF = "hf_" + "a1B2" * 9
GIT = "ghp_" + "c3D4" * 9
PLANTED = {
    "HF_TOKEN": HF,
    "OPENAI_API_KEY": "sk-" + "e5F6" * 9,
    "PHI3_MLFLOW_API_KEY": "plain-looking-serve-words",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "MLFLOW_TRACKING_PASSWORD": "sesame-of-the-server",
}
ALL = (*PLANTED.values(), GIT, "sesame-in-a-url")


def assert_none_in(text: str | bytes, *secrets: str) -> None:
    """None of the secrets (all that are planted, where none is named) is in the text."""
    data = text.encode() if isinstance(text, str) else text
    assert [secret for secret in secrets or ALL if secret.encode() in data] == []
