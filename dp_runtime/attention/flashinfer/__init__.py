"""flashinfer's own attention kernels."""
