"""tools/run.py, which runs the project's modules in environments of its own."""

import functools
import os
import signal
import subprocess
import sys

import pytest

from tests.processes import ROOT

PARENT = """
import os, sys
from tools import run

class Ready:
    def prepare(self): pass
    def command(self, *words): return [sys.executable, "-c", *words], dict(os.environ)

run.Environment = lambda name: Ready()
sys.exit(run.main())
"""
CHILD = """
import sys, time
try:
    print("at work", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(130)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="consoles of Windows interrupt by other means")
def test_an_interrupted_module_has_the_time_to_save_what_it_has():
    words = [sys.executable, "-c", PARENT, "cli", CHILD]
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background may not
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=ROOT, start_new_session=True, preexec_fn=listen, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "at work\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does with Ctrl-C
        told = process.communicate(timeout=60)
    assert (told, process.returncode) == (("saved\n", ""), 130)
