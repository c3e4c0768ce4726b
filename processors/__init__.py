"""Pictures and text in, tensors out: the processor and the image processor of MMAR."""
