"""The masked forward pass: tracing, folding, locality reuse."""
