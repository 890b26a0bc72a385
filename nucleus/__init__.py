"""Find cell nuclei in microscope images.

    model = nucleus.load("dsb2018@production")         # or a pulled folder
    found = model.segment("image.png")                 # a file, or an array
    found.labels, found.table, found.overlay()
    dataset = nucleus.import_dataset("folder", "cells")
    version = nucleus.train("recipe.toml")
    scores = nucleus.evaluate(model, dataset, split="test")

Each has a help page, as `help(nucleus.load)`. The packages of `nucleus` are the parts that they are made of; all that
needs Ray is in the package `job`.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, _ = lazy_loader.attach_stub(__name__, __file__)

__all__ = [
    "Dataset",
    "Evaluation",
    "Model",
    "ModelManifest",
    "Recipe",
    "Segmentation",
    "__version__",
    "evaluate",
    "import_dataset",
    "load",
    "open_dataset",
    "read_recipe",
    "train",
]
