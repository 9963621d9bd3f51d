"""The measurements of benchmark.py, with a file for each subject."""
