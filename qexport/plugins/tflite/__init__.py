"""The detector in TFLite operators, written straight into the flatbuffer: every scale and name is ours."""
