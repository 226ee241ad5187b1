"""What an engine would do on a GPU that is not there: whether it fits, how fast it is, how many."""
