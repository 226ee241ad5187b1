"""The sections of a configuration, a file each."""
