"""Row collectives and step boards: in-process, shared memory, torch.distributed.

Import the module you need: `shared_memory` does not load torch.distributed.
"""
