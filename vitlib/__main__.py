"""`python -m vitlib COMMAND`: what a user does with a checkpoint; without a command, all commands of the module."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

# Each is a module of `vitlib.deploy` with `arguments(parser)` and `run(options) -> exit status`.
COMMANDS: dict[str, str] = {
    "predict": "classify a folder of pictures",
    "demo": "open a page on which a dropped picture is classified by two variants side by side",
    "check": "run the deployment checklist for a checkpoint on this machine",
    "pack": "write a checkpoint with its model card and measurements into one archive",
    "export": "write the FP32 or FP16 network as ONNX or for AOTInductor, compared with the original",
}
OTHERS = {
    "report run notebooks/N.ipynb --study S": "execute a notebook into outputs/S/",
    "report index --study S": "write outputs/S/index.html",
    "report summary --study S": "print the table of variants of a study",
    "study.params N": "print the parameters cell of a notebook, such as 2_evaluate",
    "pretrained": "fetch a small pretrained network, ViT-S/14, and save it as a checkpoint",
}


class _Parser(argparse.ArgumentParser):
    """One whose errors of usage end with 1: 2 says that a part of the work is done."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 with one line on stderr where a command failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    others = "\n".join(f"  python -m vitlib.{command:<41}{meaning}" for command, meaning in OTHERS.items())
    parser = _Parser(
        prog="python -m vitlib",
        description="Use a checkpoint: outputs/<study>, a folder in its checkpoints/, or an unpacked archive.",
        epilog=f"more commands:\n{others}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, meaning in COMMANDS.items():
        command = commands.add_parser(name, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
        if given[:1] == [name]:  # the others' modules are not needed, and torch takes seconds to import
            module = importlib.import_module(f"vitlib.deploy.{name}")
            module.arguments(command)
    options = parser.parse_args(given)
    if not options.command:
        parser.print_help()
        return 0
    try:
        return module.run(options)
    except (OSError, ValueError, RuntimeError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
