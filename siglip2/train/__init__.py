"""One step, the loop around it, and what a checkpoint holds."""
