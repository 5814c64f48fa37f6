"""The quantized graph: built from a static detector and a table of encodings, the same bits every time."""
