"""Files that come in parts, each of which is kept whatever is killed."""
