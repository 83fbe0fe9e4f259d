"""Pages, tables and figures of runs, and the commands that show them."""
