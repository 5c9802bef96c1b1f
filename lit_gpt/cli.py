"""The command lines of scripts/, pretrain/ and sft/: flags from a dataclass or a function, mistakes in one line.

if __name__ == "__main__":
    with one_line_errors():
        main(parse(TrainArgs))
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def parse(component: Callable, argv: list[str] | None = None) -> Any:
    """Call `component` with what the command line (or `--config FILE.yaml`) says; an unknown flag is an error.

    Flags, types and `--help` come from the signature and its docstring, for a dataclass from the strings below its
    fields.
    """
    from jsonargparse import auto_cli, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return auto_cli(component, args=argv, as_positional=False)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Users' mistakes (ValueError, OSError, ImportError) end in one line on stderr and exit code 1.

    LIT_TRACEBACK=1 in the environment shows where they were raised.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as e:
        if os.environ.get("LIT_TRACEBACK"):
            raise
        sys.exit(f"error: {e}")
