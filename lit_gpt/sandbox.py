"""Run a program that a model wrote, with time, memory, network and the file system cut off.

    why = run_program("assert 1 + 1 == 2")      # "" when it ran to its end, else what stopped it

It runs in a Python of its own: limits of the kernel on time, memory and the size of files; no network, by a network
namespace of its own where the system allows one (`unshare`); and Python's audit hook refuses sockets, processes and
every change to files, anywhere. That holds against what language models write by accident. It is no wall against an
attacker; run strangers' models in a virtual machine.
"""

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile

# Runs first in the child. The secret, which the program does not know, is written when the program has come to its end;
# sys.exit(0) and os._exit(0) half-way are no success.
PRELUDE = """
import os, resource, sys
memory, seconds = int(sys.argv[1]), int(sys.argv[2])
secret = sys.stdin.readline()
source = sys.stdin.read()
answer = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
limits = {"AS": memory, "CPU": seconds, "FSIZE": 0, "CORE": 0, "NOFILE": 32}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
write = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
refused = ("socket.", "subprocess.", "ctypes.", "shutil.", "pty.", "os.system", "os.exec", "os.fork", "os.posix_spawn",
    "os.spawn", "os.kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link",
    "os.symlink", "os.truncate", "os.utime", "os.putenv", "signal.pthread_kill")
def refuse(event, args):
    if event.startswith(refused) or event == "open" and isinstance(args[2], int) and args[2] & write:
        raise PermissionError("not allowed here: " + event)
sys.addaudithook(refuse)
try:
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})
except BaseException as e:
    os.write(answer, f"{type(e).__name__}: {e}"[:200].encode(errors="replace"))
else:
    os.write(answer, secret.encode())
"""


def run_program(source: str, timeout_s: int = 5, memory_bytes: int = 1 << 30) -> str:
    """Run Python source text, without input or arguments, in an empty folder.

    Args:
        timeout_s: of the wall clock and of the processor.
        memory_bytes: of address space, Python's own 20 MB included.

    Returns:
        "" when it ran to its end; else its error, or what it exceeded.

    Raises:
        ValueError: on a system without the limits (Windows).
    """
    if os.name != "posix":
        raise ValueError("running a model's programs needs the limits of Linux or macOS")
    secret = secrets.token_hex(16)
    command = [*_without_network(), sys.executable, "-I", "-B", "-c", PRELUDE, str(memory_bytes), str(timeout_s)]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={"PATH": os.defpath},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(f"{secret}\n{source}", timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return f"timed out after {timeout_s} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.communicate()
    if out.strip() == secret:
        return ""
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}"
    return out.strip() or "left before its end"


@functools.cache
def _without_network() -> list[str]:
    """The command that starts another one without a network; empty where the system does not allow that."""
    command = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") and not subprocess.run([*command, "true"], capture_output=True).returncode:
        return command
    return []


def humaneval_passes(doc: dict, results: list) -> dict[str, float]:
    """The score of one answer to HumanEval (lm_eval's process_results): does the function pass its tests?"""
    (completion,) = results
    program = f"{doc['prompt']}{completion}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(not run_program(program))}
