"""Pages of keys and values, and snapshots of recurrent state."""
