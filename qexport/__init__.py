"""qexport: a trained Faster R-CNN, in int8, on small computers, and the proof.

`qexport.pipeline` tells the whole story on one page. Importing this package imports no backend.
"""

__version__ = "0.1.0"
