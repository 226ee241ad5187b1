"""What reproduces the paper: benchmarks, simulations, calibration, activation memory."""
