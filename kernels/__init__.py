"""Triton kernels and their launchers, one file per op family, installed as `ddfast.kernels`."""

if __name__ != "ddfast.kernels":
    raise ImportError(
        f"these kernels were imported as {__name__!r}; import them as 'ddfast.kernels', "
        "because a second copy of a module would compile and cache every kernel twice"
    )
