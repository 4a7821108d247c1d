"""AsymmDiT, AsymmVAE and T5 features: pure torch, single device, in the official parameter names."""
