"""Adapters that clients train by calls, on the device."""
