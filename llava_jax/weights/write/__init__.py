"""Our parameters written in the layouts of other programs."""
