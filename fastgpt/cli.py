"""The command line. One module per command stands in `fastgpt.commands`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from fastgpt import env
from fastgpt._version import __version__

# Each module has add_arguments(parser) and run(args) -> int, and imports torch only in run, so that --help is quick.
COMMANDS = {
    "demo": "train a small GPT, draw its loss, generate, and compare the speed with plain PyTorch",
    "train": "train a GPT on a text of yours",
    "finetune": "teach a model to classify messages, or to follow instructions",
    "generate": "continue a prompt with a trained model",
    "classify": "name the class of messages with a fine-tuned model",
    "chat": "ask an instruction-tuned model in the terminal",
    "export": "write a model for transformers, or as one file with the book's names",
    "check": "compare what runs here with plain PyTorch: ops, model, generation, training",
    "bench": "time every op on every backend that runs here; --tune finds the tiles of the GPU kernels",
    "info": "what runs on which kernel on this machine, or why not",
}

# What a user can mend: shown as one line, not as a traceback.
USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError)

FIRST_SCREEN = """\
first steps:
  fastgpt demo                                     the whole thing in two minutes, on data that it brings along
  fastgpt train --text my_story.txt --out run      Ctrl-C saves; `fastgpt train --resume run` goes on
  fastgpt generate --model run --prompt "Once"
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="fastgpt",
        description="The GPT of Build a Large Language Model (From Scratch), fast.",
        epilog=FIRST_SCREEN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastgpt {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"fastgpt.commands.{name}")
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=getattr(module, "EXAMPLES", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process when None.

    Returns:
        Exit status: 0; 1 when the command found something wrong; 2 for an error of the user; 130 after Ctrl-C.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        logging.basicConfig(level=env.log_level(), format="fastgpt: %(message)s")
        status: int = importlib.import_module(f"fastgpt.commands.{args.command}").run(args)
        return status
    except KeyboardInterrupt:
        print("\nfastgpt: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone (`fastgpt info | head`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if args.debug:
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"fastgpt {args.command}: {text or type(error).__name__}", file=sys.stderr)
        return 2
