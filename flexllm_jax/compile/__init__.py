"""Ahead-of-time compilation of the step programs."""
