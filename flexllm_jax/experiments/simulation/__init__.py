"""Engines and fleets simulated from a YAML file, beside the paper's measurements."""
