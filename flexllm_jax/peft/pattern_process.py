"""The process that matches an adapter's regular expressions with modules (`patterns`).

It may be ended in the midst of it: some expressions take longer than the universe has. Standard
library only, as it is started for every adapter that has expressions.
"""

import json
import re
import resource
import signal
import sys

MATCHERS = {"whole": re.fullmatch, "start": re.match}


def find_all(expressions, paths):
    """For each of (how, expression) what it says of each path: None for no match, else its groups.
    ValueError(expression, reason) for one that is none."""
    found = []
    for how, expression in expressions:
        try:
            matches = [MATCHERS[how](expression, path) for path in paths]
        except (re.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(expression, str(error) or repr(error)) from None
        found.append([None if match is None else match.groupdict() for match in matches])
    return found


def main() -> None:
    """Read limits, paths and expressions; write what `find_all` tells."""
    given = json.load(sys.stdin)
    signal.setitimer(signal.ITIMER_PROF, given["cpu_s"])  # nobody handles it: it ends the process
    most = given["memory_mb"] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        told = {"found": find_all(given["expressions"], given["paths"])}
    except ValueError as error:
        told = {"expression": error.args[0], "error": error.args[1]}
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
