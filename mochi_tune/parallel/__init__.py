"""Functions over models that know nothing of them: less memory, several processes."""
