"""The data room: sources of encoded samples, their order, decoding, crops, and the loader that makes batches."""
