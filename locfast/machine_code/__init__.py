"""What compilers make of locfast's GPU kernels, read on any machine: `python -m locfast.inspect`.

worker.py     compiles Triton kernels, in processes of its own (Triton decides at import whether it interprets)
pool.py       asks several of them at once and outlives their crashes
library.py    the CUDA kernels in locfast/_C.so
sass.py       registers, stack, shared memory and instruction counts, from NVIDIA's cuobjdump
occupancy.py  blocks on a multiprocessor, and what limits them
listing.py    all of it as rows; table.py prints them, check.py judges them
"""
