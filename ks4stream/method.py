"""The version of the method, which docs/method.md describes and pipeline.py carries out."""

METHOD_VERSION = 16
"""Raised with each change of the method that changes a result: what a run of another version found cannot be used."""
