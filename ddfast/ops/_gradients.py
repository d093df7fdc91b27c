"""Registration and public faces of grad_sq_norm_*."""
