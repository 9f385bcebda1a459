"""Ranks that meet through torch.distributed: Gloo and NCCL."""
