"""Parameters laid out over processes, and what files make of that."""
