"""Sphinx configuration: ``sphinx-build -W docs build/docs``; nothing is fetched from the network."""

import lcconformer

project = "lcconformer"
author = "the lcconformer authors"
copyright = f"2026, {author}"
release = version = lcconformer.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"lcconformer {version}"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
smartquotes = False  # code in prose stays as it can be typed

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# a plain list: several attributes may share a line, and autodoc must not list those of a dataclass a second time
napoleon_custom_sections = [("Attributes", "params_style")]

# every reference must resolve, except those to other packages: their inventories are on the network
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|transformers|np|numpy|collections|pathlib|argparse|os|nullcontext)\..*"),
    (r"py:class", r"(Tensor|Module|Path|Any|Sequence|Callable|Iterator|Mapping|Collection|Positions|optional)"),
    (r"py:class", r"lcconformer\..*\.(_\w+|Count)"),  # private types in a signature
]
