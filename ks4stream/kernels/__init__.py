"""The arithmetic of spike sorting: tensors in, tensors out, on the device of the input.

Nothing here depends on Dask, files, settings or logs. "Section n" and "step n" in comments and docstrings
refer to docs/method.md, which specifies the method; steps without a section are those of section 6. The same letters
stand for the same axes throughout the package, in einsum, shape comments and docstrings:

====== ==================================================================================================
letter axis
====== ==================================================================================================
c      channel (those that are sorted, probe order)
t      sample
w      sample within a waveform, 0 … nt−1
b      batch (tile)
k      centre of universal templates
j      neighbour slot: nearest channels of a centre or a unit, nearest first
s      spatial size (Gaussian) of a universal template
p      universal waveform (row of wTEMP)
q      principal component of waveforms (row of wPCA)
u, v   unit (learned template)
n      peak or spike
d      flattened feature of a spike within a region: channel × component
l      lag, −nt … nt
m      landmark of the clustering graph
g      depth segment of the drift estimate
z      depth bin of a fingerprint
a      amplitude bin of a fingerprint
====== ==================================================================================================

Traces are channel-major (c, t) in kernels; elsewhere recordings are time-major (time, channel).
"""
