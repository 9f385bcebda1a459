"""What benchmarks share: flags, the machine in words, timing, floors, ranks that they drive."""
