"""Moves a registry alias back, to the version that had it before or to a version that is named.

    mlflow run . --env-manager local -e rollback -P model_uri=models:/phi3@champion
    mlflow run . --env-manager local -e rollback -P model_uri=models:/phi3@champion -P version=3

`evaluate` notes which version had the alias when it moves one. Nothing is scored.
"""

import sys

from slm.base import model_uri, parameters
from slm.base.errors import BadInput
from slm.base.wording import quoted
from slm.tracking import lifecycle


def parse_args(argv: list[str] | None) -> parameters.Parameters:
    return parameters.parse("rollback", __doc__, argv)


def main(argv: list[str] | None = None) -> int:
    return lifecycle.exit_code(lambda: rollback(parse_args(argv)))


def rollback(args: parameters.Parameters) -> str:
    """The story of the run; returns the gate's state, which is "none" here."""
    from slm.evaluation import promotion

    named = model_uri.registered_alias(args.model_uri)
    if named is None:
        raise BadInput(f"model_uri: {quoted(args.model_uri)} names no alias; write models:/NAME@champion")
    with lifecycle.run("rollback", args):
        promotion.set_back(*named, args.version)
    return "none"


if __name__ == "__main__":
    sys.exit(main())
