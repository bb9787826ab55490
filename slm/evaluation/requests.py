"""The parameters of a request that need more than a type check: the gate and the generation. No model is opened."""

from slm.base import parameters
from slm.base.errors import BadInput
from slm.base.parameters import Parameters
from slm.models import checkpoints
from slm.verdict import gate


def read_gate(args: Parameters) -> tuple[gate.Threshold, ...]:
    """The thresholds in the file that `thresholds` names. None if `thresholds` is empty.

    Raises:
        BadInput: the file does not exist, or is not a gate.
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
    """The parameters of generation and hardware. The logged model takes them as its defaults."""
    names = ("max_tokens", "temperature", "top_p", "seed", "batch_size", "dtype", "device")
    chosen = {name: getattr(args, name) for name in names if name in vars(args)}
    return chosen | {"stop": parameters.stop_strings(args.stop)}
