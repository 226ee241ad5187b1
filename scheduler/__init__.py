"""The hybrid token scheduler, in pure Python."""
