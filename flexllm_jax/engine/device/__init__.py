"""The programs of an engine: compiled, run, profiled; what to do where memory ends."""
