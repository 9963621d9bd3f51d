"""Parts of plan_parallel.py."""
