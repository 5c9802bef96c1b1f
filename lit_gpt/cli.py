"""The command lines of scripts/, pretrain/ and sft/: flags from a dataclass or a function, mistakes in one line.

if __name__ == "__main__":
    with one_line_errors():
        main(parse(TrainArgs))
"""

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any


def parse(component: Callable, argv: list[str] | None = None) -> Any:
    """Call `component` with what the command line (or `--config FILE.yaml`) says; an unknown flag is an error.

    Flags, types and `--help` come from the signature and its docstring, for a dataclass from the strings below its
    fields.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    # Half of the time of parsing goes into finding the strings below fields, and only --help shows them.
    set_parsing_settings(docstring_parse_attribute_docstrings=not {"-h", "--help"}.isdisjoint(argv or sys.argv))
    description = inspect.getdoc(component).split("\n\nArgs:")[0]  # each argument is explained at its flag
    parser = ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of flags; later flags override it.")
    add = parser.add_class_arguments if inspect.isclass(component) else parser.add_function_arguments
    add(component, as_group=False)
    flags = parser.instantiate(parser.parse_args(argv)).as_dict()
    flags.pop("config")
    return component(**flags)


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


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Users' mistakes (ValueError, OSError, ImportError) end in one line on stderr and exit code 1.

    Warnings take one line, too. LIT_TRACEBACK=1 in the environment shows where an error was raised.
    """
    warnings.formatwarning = lambda message, category, filename, lineno, line=None: f"warning: {message}\n"
    # Lightning advises srun wherever it is installed, also outside of SLURM jobs; PRETRAIN.md says how to start one.
    warnings.filterwarnings("ignore", "The `srun` command is available")
    try:
        yield
    except (ValueError, OSError, ImportError) as e:
        if os.environ.get("LIT_TRACEBACK"):
            raise
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)  # what a shell reports for Ctrl-C
