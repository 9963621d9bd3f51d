"""The calculations of plan_parallel.py, with a file for each subject."""
