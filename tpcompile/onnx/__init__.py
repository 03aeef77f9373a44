"""From a compiled program to ONNX files: written, fused, lowered for runtimes that know less, typed, quantised, cut at the sites."""
