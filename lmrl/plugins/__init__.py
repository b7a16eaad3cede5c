"""User code: names for it, loading it by file or package, calling it, and objects of a Python program in its place."""
