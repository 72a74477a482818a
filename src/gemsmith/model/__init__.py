"""The network, as PyTorch modules. It asks a KVStore for attention and knows no batches."""
