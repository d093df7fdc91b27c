"""Methods that sample images from a diffusion model."""
