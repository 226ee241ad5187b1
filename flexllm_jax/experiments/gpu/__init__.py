"""What is compiled for GPUs without one, and what is checked, timed and tuned on one."""
