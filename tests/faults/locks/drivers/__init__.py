"""One lock each, in a process and an environment of its own; they import nothing of ours but `stage`."""
