"""What was asked for, checked before anything is opened or fetched: the gate, and the generation."""

from slm.base import parameters
from slm.base.errors import BadInput
from slm.base.parameters import Parameters
from slm.models import checkpoints
from slm.verdict import gate


def read_gate(args: Parameters) -> tuple[gate.Threshold, ...]:
    """The thresholds that `thresholds` names; none where it is empty.

    Raises:
        BadInput: the file isn't there, or is no gate.
    """
    if not args.thresholds:
        return ()
    path = checkpoints.located(args.thresholds)
    if path is None or not path.is_file():
        raise BadInput(f"thresholds: {args.thresholds!r} does not exist")
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(gate.GATE_CHARACTERS + 1)
    except OSError as error:
        raise BadInput(f"thresholds: {args.thresholds!r} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"thresholds: {args.thresholds!r} is not UTF-8; save it as UTF-8") from None
    return gate.read_thresholds(text, path.name)


def generation(args: Parameters) -> dict:
    """How answers are generated, and on what: the parameters that the logged model takes as its defaults."""
    names = ("max_tokens", "temperature", "top_p", "seed", "batch_size", "dtype", "device")
    chosen = {name: getattr(args, name) for name in names if name in vars(args)}
    return chosen | {"stop": parameters.stop_strings(args.stop)}
