"""The TRT-LLM attention kernels, called through flashinfer."""
