"""A short fine-tune with fake quantization of the very scheme that is exported.

The detector is trained in the form in which it is exported: BatchNorm folded, every quantizer where the
exporters put it, activation scales with few bits, biases on their int32 grid. What comes out are weights and
encodings that the quantized reference and every target apply as they are.
"""
