"""Registration and public faces of crop_resize."""
