"""Loads on the HTTP server: what its clients see, what it costs the engine, whether it leaks.

Needs httpx2, which the extra `load` installs.
"""
