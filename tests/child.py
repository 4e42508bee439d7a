"""Processes for test_processes.py that need not import torch and TRL, which takes most of a short process.

They are forked from a server that has imported the script; all else about them is real.
"""

import multiprocessing
import os
import sys

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["finetune_medical_gpt2"])


class Child:
    """`function(*arguments)` in a process of its own; `stdout` can be read while it runs, `error()` after its end."""

    def __init__(self, tmp_path, function, *arguments, variables=None):
        self.error_path = tmp_path / f"stderr-{len(list(tmp_path.glob('stderr-*')))}"
        self.error_path.touch()
        reader, writer = FORKS.Pipe(duplex=False)
        self.process = FORKS.Process(
            target=in_child, args=(writer, self.error_path, variables or {}, function, arguments), daemon=True
        )
        self.process.start()
        writer.close()
        self.stdout = open(reader.fileno(), encoding="utf-8", closefd=False)
        self.reader = reader  # which closes its end when it is collected

    def exit_code(self):
        self.process.join()
        return self.process.exitcode

    def error(self):
        return self.error_path.read_text(encoding="utf-8")


def in_child(writer, error_path, variables, function, arguments):
    """In the new process: what it writes goes to the pipe and to the file of its errors."""
    os.dup2(writer.fileno(), 1)
    writer.close()
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # the server's may be a file, which is no pipe
    os.dup2(os.open(error_path, os.O_WRONLY), 2)
    os.environ.update(variables)
    function(*arguments)
