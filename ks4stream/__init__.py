"""Spike sorting the way Kilosort4 does it, as a dataflow on Dask."""
