"""Tool calls in what models write."""
