"""The Tinker API as it is on the wire: bodies and paths."""
