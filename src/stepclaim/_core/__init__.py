"""Every decision, and no I/O: programs are generators that yield operations and are sent replies."""
