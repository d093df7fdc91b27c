"""Registration and public faces of masked_batch, shapley_heatmap and noisy_crop_boxes."""
