"""The steps of a sort, one object each (`base.py`), the methods they take, and the arithmetic of their needs.

No Dask: the same objects are computed in a plain loop and on a cluster. "Section n" in comments and docstrings is that
of docs/method.md, which specifies the method.
"""
