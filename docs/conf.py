"""Settings of the documentation: `make docs` builds it into build/docs, from this tree alone, without a network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

from sharpwise import __version__

project = "sharpwise"
author = "the sharpwise authors"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "public",  # our own, in _extensions/
    "configuration",
    "commands",
    "paper",
    "studies",
    "hosts",
    "examples",
]
exclude_patterns = ["_extensions"]
html_theme = "furo"
html_title = "sharpwise"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_copyright = False
html_copy_source = False

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

smartquotes_action = "De"  # dashes and dots: quotes are part of what is typed
default_role = "code"  # docstrings write names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = False
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 80

# Links to what is public are checked. Names of other libraries are not, as nothing is fetched, nor are inner types of
# signatures, `sharpwise.engine.options.Storage`, which lie a module deeper than what is exported.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!sharpwise\.).*"), ("py:.*", r"sharpwise\.(\w+\.\w+|shards|table)\..*")]
