"""Ops: `reference` explains them in NumPy; `cpu` runs them as native code. Same names, same arguments."""
