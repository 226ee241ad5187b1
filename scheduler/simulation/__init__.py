"""The scheduler on a virtual clock: one engine, a fleet, their workloads."""
