"""Functions over models that know nothing of them: memory now, several devices later."""
