"""One function per operator of the graph, which writes its ONNX nodes."""
