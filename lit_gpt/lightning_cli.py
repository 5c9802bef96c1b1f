"""`lightning run model ...`, the launch command that TinyLlama's users know and that lightning no longer ships.

It hands its arguments over to `fabric run`, which takes the same flags.
"""

import os
import shutil
import sys


def main() -> None:
    if sys.argv[1:3] != ["run", "model"]:
        sys.exit("usage: lightning run model [--devices N] [--num-nodes N] ... SCRIPT [ARGS]; see `fabric run --help`")
    fabric = shutil.which("fabric", path=os.path.dirname(sys.executable)) or shutil.which("fabric")
    if fabric is None:
        sys.exit("error: the command `fabric` is not installed; pip install lightning-fabric")
    os.execv(fabric, [fabric, "run", *sys.argv[3:]])
