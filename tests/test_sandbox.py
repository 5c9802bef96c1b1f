"""What a program that a model wrote can and cannot do."""

import socket
import threading

import pytest

from lit_gpt import sandbox
from lit_gpt.sandbox import humaneval_passes, run_program

PROBLEM = {
    "prompt": 'def add(a: int, b: int) -> int:\n    """The sum."""\n',
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}


@pytest.fixture(params=["namespace", "audit hook alone"])
def network(request, monkeypatch):
    if request.param == "namespace":
        if not sandbox._without_network():
            pytest.skip("this system gives no network namespaces")
    else:
        monkeypatch.setattr(sandbox, "_without_network", lambda: [])


def test_right_programs_pass_and_wrong_ones_say_why():
    assert run_program("import math, re, collections\nassert math.gcd(4, 6) == 2\nprint('x' * 100000)") == ""
    assert run_program("assert 1 == 2, 'no'") == "AssertionError: no"
    assert "SyntaxError" in run_program("def f(:")
    assert humaneval_passes(PROBLEM, ["    return a + b\n"]) == {"pass@1": 1.0}
    assert humaneval_passes(PROBLEM, ["    return a - b\n"]) == {"pass@1": 0.0}


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_leaving_before_the_tests_is_no_success(leave):
    assert run_program(leave) != ""


def test_time_ends():
    assert run_program("import time\ntime.sleep(60)", timeout_s=1) == "timed out after 1 s"
    assert run_program("while True: pass", timeout_s=1) != ""


def test_memory_ends():
    assert run_program("x = bytearray(100 << 20)") == ""
    assert "MemoryError" in run_program("x = bytearray(3 << 30)")
    assert "MemoryError" in run_program("x = []\nwhile True: x.append(bytearray(1 << 20))")


def test_there_is_no_network(network):
    server = socket.create_server(("127.0.0.1", 0))
    reached = []
    threading.Thread(target=lambda: reached.append(server.accept()), daemon=True).start()
    port = server.getsockname()[1]
    assert run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)") != ""
    assert run_program(f"import _socket\ns = _socket.socket()\ns.connect(('127.0.0.1', {port}))") != ""
    assert run_program("import urllib.request\nurllib.request.urlopen('http://example.com', timeout=1)") != ""
    assert not reached
    server.close()


def test_files_and_processes_are_out_of_reach(tmp_path):
    file = tmp_path / "precious"
    file.write_text("here")
    for attempt in (
        f"open({str(file)!r}, 'w')",
        f"import os; os.remove({str(file)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import pathlib; pathlib.Path({str(file)!r}).write_text('x')",
        f"import os; os.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY)",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "import ctypes; ctypes.CDLL(None)",
    ):
        assert "not allowed here" in run_program(attempt), attempt
    assert file.read_text() == "here" and [p.name for p in tmp_path.iterdir()] == ["precious"]
