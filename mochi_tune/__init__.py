"""LoRA fine-tuning for Mochi 1."""
