"""By which names clients may ask for the served model."""

import pytest
from support.openai_servers import NAME

from slm.serving import protocol, versions


@pytest.mark.parametrize(
    ("uri", "resolved", "chosen", "names"),
    [
        (
            "models:/supportbot@champion",
            "models:/supportbot/3",
            "",
            (
                "supportbot",
                "supportbot/3",
                "supportbot@champion",
                "models:/supportbot@champion",
                "models:/supportbot/3",
                "smollm2",
            ),
        ),
        (
            "models:/supportbot/3",
            "models:/supportbot/3",
            "gpt-4o-mini",
            ("gpt-4o-mini", "supportbot", "supportbot/3", "models:/supportbot/3", "smollm2"),
        ),
        ("models:/m-0123", "models:/m-0123", "", ("smollm2",)),
        ("runs:/0123/onnx", "runs:/0123/onnx", "mine", ("mine", "smollm2")),
    ],
)
def test_a_model_has_its_registered_name_its_checkpoint_s_and_one_that_was_chosen(uri, resolved, chosen, names):
    assert protocol.model_names(uri, resolved, "smollm2", chosen) == names


@pytest.mark.usefixtures("logged")
def test_a_served_model_has_the_name_that_was_chosen(store):
    assert versions.load(store[1]["chat"], served_model_name="mine").names == ("mine", NAME)


def test_another_name_is_refused_with_the_first_one():
    protocol.check_model("supportbot", ("supportbot", "smollm2"))
    with pytest.raises(protocol.ApiError, match="model: 'gpt-4o' is not served here; 'supportbot' is"):
        protocol.check_model("gpt-4o", ("supportbot", "smollm2"))
