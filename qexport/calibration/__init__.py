"""Images to encodings."""
