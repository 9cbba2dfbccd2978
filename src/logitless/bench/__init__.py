"""``logitless bench``: time, peak memory and error of this library and of its peers, on the same inputs in one run."""
