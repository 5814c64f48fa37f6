"""Write TensorRT layers into a network."""
