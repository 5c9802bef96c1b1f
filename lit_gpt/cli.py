"""The command lines of scripts/, pretrain/ and sft/: flags from a dataclass or a function, mistakes in one line.

if __name__ == "__main__":
    with one_line_errors():
        main(parse(TrainArgs))
"""

import inspect
import json
import os
import re
import signal
import sys
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_gpt.config import did_you_mean


def parse(component: Callable, argv: list[str] | None = None) -> Any:
    """Call `component` with what the command line (or `--config FILE.yaml`) says; an unknown flag is an error.

    Flags, types and `--help` come from the signature and its docstring, for a dataclass from the strings below its
    fields. A flag that takes a list takes a,b as well as YAML's [a, b].
    """
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser, set_parsing_settings

    argv = sys.argv[1:] if argv is None else argv
    # Half of the time of parsing goes into finding the strings below fields, and only --help shows them.
    set_parsing_settings(docstring_parse_attribute_docstrings=not {"-h", "--help"}.isdisjoint(argv))
    description = inspect.getdoc(component).split("\n\nArgs:")[0]  # each argument is explained at its flag
    parser = ArgumentParser(description=description, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of flags; later flags override it.")
    add = parser.add_class_arguments if inspect.isclass(component) else parser.add_function_arguments
    add(component, as_group=False)
    hints = {"config": Path, **typing.get_type_hints(component)}
    hints.pop("return", None)
    try:
        flags = parser.instantiate(parser.parse_args(_with_lists(argv, hints))).as_dict()
    except ArgumentError as e:
        sys.stderr.write(f"error: {_in_short(str(e), hints)} --help explains all flags\n")
        sys.exit(2)
    flags.pop("config")
    return component(**flags)


def _with_lists(argv: list[str], hints: dict[str, Any]) -> list[str]:
    """The words of a command line, with a,b as a list where a flag takes lists and no plain text."""
    kinds = {f"--{name}": _kinds(hint) for name, hint in hints.items()}
    lists = {flag for flag, of in kinds.items() if str not in of and any(typing.get_origin(k) is list for k in of)}
    words: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if words and words[-1] in lists:
            word = _as_list(word)
        elif equals and flag in lists:
            word = f"{flag}={_as_list(value)}"
        words.append(word)
    return words


def _as_list(value: str) -> str:
    is_yaml_or_flag = re.match(r"\s*(\[|-|null$)", value)
    return value if is_yaml_or_flag else json.dumps(value.split(","))


def _in_short(message: str, hints: dict[str, Any]) -> str:
    """What jsonargparse says, in a line, with the nearest flag or choice that there is."""
    refused = re.match(r'Parser key "(\w+)":.*Expected a .*\b[Vv]alue: (.*)', message, re.DOTALL)
    if refused and refused[1] in hints:
        kinds = _kinds(hints[refused[1]])
        choices = [str(c) for k in kinds if typing.get_origin(k) is typing.Literal for c in typing.get_args(k)]
        others = [inspect.formatannotation(k) for k in kinds if typing.get_origin(k) is not typing.Literal]
        line = f"--{refused[1]} {refused[2]}: expected {' or '.join(choices + others)}."
        return line + did_you_mean(refused[2], choices)
    line = re.sub(r'Parser key "(\w+)"', r"--\1", " ".join(message.split())) + "."
    unknown = re.search(r"unrecognized arguments: .*?(--[\w-]+)|Option '(\w+)' is not accepted", line)
    if not unknown:
        return line
    # The dashes alone make any two flags somewhat alike.
    return line + did_you_mean(unknown[1] or f"--{unknown[2]}", [f"--{name}" for name in hints], cutoff=0.7)


def _kinds(hint: Any) -> list:
    """list[str] | None -> [list[str]]."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [kind for kind in typing.get_args(hint) if kind is not types.NoneType] if is_union else [hint]


def check_flags(args: Any, positive: Collection[str], not_negative: Collection[str] = ()) -> None:
    """What makes no sense anywhere, whatever the data and the machine. None, for a flag that is not given, is fine.

    Raises: ValueError naming every field of `args` among these that is not positive or is negative, and `devices` that
    are neither auto nor a number.
    """
    problems = [f"--{f} {v} is not positive" for f in positive if (v := getattr(args, f)) is not None and v <= 0]
    problems += [f"--{f} {v} is negative" for f in not_negative if (v := getattr(args, f)) is not None and v < 0]
    if args.devices != "auto" and not (str(args.devices).isdecimal() and int(args.devices)):
        problems.append(f"--devices {args.devices} is neither auto nor a number of devices")
    if problems:
        raise ValueError("; ".join(problems))


def quiet_imports() -> None:
    """Until `one_line_errors`, Ctrl-C ends the program without a word: where libraries were then being imported says
    nothing to anybody."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Users' mistakes (ValueError, OSError, ImportError) end in one line on stderr and exit code 1.

    Warnings take one line, too. LIT_TRACEBACK=1 in the environment shows where an error was raised.
    """
    warnings.formatwarning = lambda message, category, filename, lineno, line=None: f"warning: {message}\n"
    # Lightning advises srun wherever it is installed, also outside of SLURM jobs; PRETRAIN.md says how to start one.
    warnings.filterwarnings("ignore", "The `srun` command is available")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except (ValueError, OSError, ImportError) as e:
        if os.environ.get("LIT_TRACEBACK"):
            raise
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)  # what a shell reports for Ctrl-C


@contextmanager
def out_of_memory(way_out: str) -> Iterator[None]:
    """torch's OutOfMemoryError, also of a function decorated with this, becomes a ValueError that ends in `way_out`."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as e:
        asked_and_there = ". ".join(str(e).split(". ")[:3])  # the rest is about fragments
        raise ValueError(f"{asked_and_there}. {way_out}") from e
