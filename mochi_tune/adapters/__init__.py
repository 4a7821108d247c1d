"""LoRA adapters: their layers, the trainable ones in a live model, and the files that hold them."""
