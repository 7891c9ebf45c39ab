"""The steps of a sort, one object each (`base.py`), the methods they take as parameters, and what they need (`needs.py`).

No Dask: the same objects are computed in a plain loop and on a cluster. "Section n" in comments and docstrings is that
of docs/method.md, which specifies the method.
"""
