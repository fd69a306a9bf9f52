"""One causal language model as bottom, trunk and top: partition, loading of one segment, LoRA adapters."""
