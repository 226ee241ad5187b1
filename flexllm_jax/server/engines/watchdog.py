"""The end of a process by a deadline that holds whatever hangs in it.

The clock is a thread of C (`faulthandler`), which needs neither the interpreter's lock nor any
other thread: a library that never returns cannot hold it up. It writes to stderr where each thread
stood, and ends the process with status 1.
"""

from __future__ import annotations

import faulthandler
import sys


def end_within(seconds: float) -> None:
    """End this process `seconds` from now, unless this is called again before; the last call
    counts."""
    faulthandler.dump_traceback_later(max(seconds, 0.001), exit=True, file=sys.__stderr__ or 2)


def stand_down() -> None:
    """Let the process go on."""
    faulthandler.cancel_dump_traceback_later()
