"""Ways to share a device, compared in simulation and on the real engine."""
