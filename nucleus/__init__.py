"""Find cell nuclei in microscope images: data, network, registry and prediction.

What runs on Ray lives in the package `job`; nothing in here imports it but the command line.
"""

__all__ = ["__version__"]

__version__ = "0.2.0"
