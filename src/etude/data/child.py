"""A script of this package in a process of its own, with a pipe to it and a pipe from it.

Nothing of the caller's program runs there, so that it works in a notebook, in a daemon, and in a script without a main
guard. A script ends when its stdin does: so none outlives a caller that was killed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from types import ModuleType

Child = subprocess.Popen[bytes]


def start(script: ModuleType, **environment: str) -> Child:
    """Run the file of a module that is written as a script.

    Raises:
        OSError: no process can be started.
    """
    return subprocess.Popen(
        # -P keeps the folder of the script, whose modules have common names, off the import path.
        [sys.executable, "-P", str(script.__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
    )


def end(child: Child) -> None:
    """Kill it, whatever it is doing."""
    child.kill()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):  # an unsent request has nobody to go to
            pipe.close()
    child.wait()
