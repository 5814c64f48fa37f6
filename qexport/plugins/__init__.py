"""How each runtime computes the operators of a detector: one operator a file, forms proven against torchvision's."""
