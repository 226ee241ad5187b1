"""A process of its own for a client's program: run as a program, by its path."""
