"""Triton kernels and their launchers, installed as ``par_xl.kernels``."""

if __name__ != "par_xl.kernels":
    # Run from the repository's root, `import kernels` would find this folder and load every kernel a second time.
    raise ImportError("these kernels are installed as par_xl.kernels; import that")
