"""The programs of an engine: placed, compiled, run, profiled."""
