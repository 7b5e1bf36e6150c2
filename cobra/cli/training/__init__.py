"""`cobra train` and what it shares with `cobra calibrate`: settings, data, models, and the run itself."""
