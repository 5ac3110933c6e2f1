"""Run commands of laconic in processes that can be sent signals, without the seconds that importing torch takes.

``Forking`` starts one process that has imported everything, and that forks for each command. Run as a program, this file is
that process: it reads one JSON object a line, and answers with the number of the process, and with its exit code at its end.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

MODULES = ("accelerate", "timm", "tyro", "torchvision", "laconic.cli.train", "laconic.cli.sweep", "laconic.cli.export")
MODULES += ("laconic.cli.embed", "pyarrow.parquet")


class Job:
    """A command that runs."""

    def __init__(self, server, pid, out, err):
        self.server, self.pid, self.out_file, self.err_file = server, pid, out, err

    def wait(self):
        """Return the exit code, negative for the signal that killed it."""
        return int(self.server.ask({"wait": self.pid}))

    def kill(self, number):
        """Send a signal to the command's process."""
        os.kill(self.pid, number)

    def kill_group(self, number):
        """Send a signal to the command and its workers, as a terminal does."""
        os.killpg(self.pid, number)

    @property
    def out(self):
        return self.out_file.read_text()

    @property
    def err(self):
        return self.err_file.read_text()


class Forking:
    """The process that forks."""

    def __init__(self, folder):
        self.folder, self.number = Path(folder), 0
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], env=env, **pipes)

    def ask(self, question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def start(self, *words):
        self.number += 1
        out, err = (self.folder / f"{self.number}.{end}" for end in ("out", "err"))
        words = [str(word) for word in words]
        return Job(self, int(self.ask({"words": words, "out": str(out), "err": str(err)})), out, err)

    def run(self, *words):
        """Run a command to its end; return it, with its exit code and seconds."""
        start = time.monotonic()
        job = self.start(*words)
        job.code = job.wait()
        job.seconds = time.monotonic() - start
        return job

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def child(order):
    """Run a command in this process, and end it."""
    os.setpgid(0, 0)
    for number, name in ((1, order["out"]), (2, order["err"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.umask(0o022)
    sys.argv = ["laconic", *order["words"]]
    from laconic.cli.__main__ import main

    try:
        code = main()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code)


def serve():
    import importlib

    import torch

    torch.set_num_threads(1)
    for name in MODULES:
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if not pid:
            child(order)
        with contextlib.suppress(OSError):  # it has done so itself, or is gone
            os.setpgid(pid, pid)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
