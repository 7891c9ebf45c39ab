"""The stages of a sort, one file each.

A stage is a frozen callable that maps a block (a run of tiles) to what it contributes, and a function that
combines the contributions in the order of the tiles. No Dask: the same callables run in a plain loop.
"Section n" in comments and docstrings is that of docs/method.md, which specifies the method.
"""
