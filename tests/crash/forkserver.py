"""Runs one save per line of JSON on its input, each in a forked child, so that imports are paid once.

Started with the shim in LD_PRELOAD; answers each line with {"signal", "report"}.
"""

from __future__ import annotations

import json
import logging
import os
import sys

import saves


def main() -> None:
    logging.disable(logging.CRITICAL)  # what could not be deleted is expected here
    for line in sys.stdin:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            saves.run_child(json.loads(line), write_end)
            os._exit(0)
        os.close(write_end)
        with open(read_end, "rb") as pipe:
            report = pipe.read().decode()
        _, status = os.waitpid(child, 0)
        signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        print(json.dumps({"signal": signal, "report": report}), flush=True)


main()
